// Package dirty counts, in the kernel, the write faults of processes on chosen
// ranges of their memory: a live counter of the pages written since they were
// write-protected asynchronously, a bitmap of which they were, and how many
// there were in each 2 MiB (heat).
//
// # Life cycle
//
// Load loads the programs and attaches them to the fault tracepoints of the
// whole host; a write fault of a process nobody asked about costs one hash
// lookup. Track begins to count a process, Untrack ends that; Close ends
// everything. Nothing is pinned: when the process that loaded the programs ends,
// however it does, the kernel drops programs and maps.
//
// # What the counter is and is not
//
// The bitmap holds what was written through faults: stores of the vCPUs and
// copies by the kernel in QEMU's name or in a vhost worker's. Direct I/O into
// guest memory pins pages without a fault, so that the page map
// (uffd/pagemap) stays the authority; the counter is what can be read at any
// moment without a scan.
//
// # Concurrency
//
// Methods may be called from any goroutine; a Target's methods by one at a time.
// The counters and the bitmap are shared with the kernel: words are read and
// exchanged atomically.
package dirty
