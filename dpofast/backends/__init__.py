"""Backends: each module has ``forward`` and ``backward`` of linear_logprob and of logprob on packed rows."""
