// Asking the system for huge pages.
#pragma once
#include <cstddef>

namespace dpofast::cpu {

// Lets [start, start + bytes) be backed by huge pages, where the system has them. A buffer of hundreds of MB that
// is written once costs a fault per page; with 4 KiB pages that is a tenth of the whole computation. Advice only:
// it never fails, and does nothing on small buffers.
void advise_huge_pages(void* start, size_t bytes);

}  // namespace dpofast::cpu
