// Package source reads guest RAM out of a QEMU process without changing it: no
// page is populated, no hole of a file is filled, no huge page is split.
//
// # What a page can be
//
// Whether an absent page reads as zero depends on what backs the RAMBlock:
//
//   - Anonymous: absent from the page table (neither present nor swapped) is zero.
//   - PrivateFile: absent from the page table shows the file; a hole of the file is zero.
//   - Shared: the page table says nothing; only a hole of the file is zero.
//
// Runs answers with that in mind; Read copies.
//
// # Concurrency and failure modes
//
// A Source is immutable after Open and safe for concurrent use. Answers describe
// the moment of the call: a running guest changes them. It is the capture engines
// that make them true for one instant. When the process ends, calls fail with
// ESRCH; when a page cannot be read, with EFAULT.
package source
