// Package cow copies a page of another process inside the kernel, before the first
// write to it since it was write-protected asynchronously (WP_ASYNC). The writer
// never waits: its fault goes on to be resolved by the kernel as always.
//
// # Why the copy is the page as it was
//
// The programs run at the entry of every page fault of the host, with interrupts off,
// before the kernel looks at the fault. For a write to memory they are asked to watch
// they walk the page tables, see that the entry that maps the page bears the
// write-protect mark, copy the page through the kernel's direct map, and read the entry
// again. The kernel takes the mark off before anybody can write through the entry. An
// entry that bears it after the copy, and maps the same frame, proves that nobody had
// written before. An entry that changed (the page was moved, or a huge page split) is
// looked up anew; one without the mark was written already, and whoever did so has
// passed here before.
//
// # What is seen
//
//   - Stores of the process's threads: page_fault_user.
//   - Copies by the kernel in the process's name or in a kernel thread's that has taken
//     its address space on (vhost): page_fault_kernel.
//   - Direct I/O into the memory, on file systems that use iomap: iomap_dio_rw_begin.
//   - Stores of a guest under KVM with page tables of its own (EPT, NPT):
//     kvm_page_fault, which leads from guest-physical addresses to the process's.
//
// The page tables are physical memory. Where the kernel maps that, it tells nobody; the
// base is found by guessing, and a guess is believed only if the tables of our own
// process, read by way of it, lead from a page to the random bytes that we have put
// there. (That they lead to some page is no proof: from a wrong base any memory is taken
// for tables. A search that asked for no more than that was wrong now and then, and its
// programs found no page mapped at all.)
//
// # Pages that are not mapped
//
// Where nothing is mapped at the arm, the mark is an entry of its own. The kernel maps
// the page marked, and the write faults a second time: but if another thread maps it
// between the look of a program and the kernel's own, the first fault takes the mark off,
// and there is no second. (Direct I/O and a guest's fault under KVM pass here once in any
// case.) So the record is made at the first look. It has no content: the entry is proof
// enough that nobody has touched the page since the arm. A page that is discarded or
// swapped out has another, or none; of anonymous memory, that is, so it is the caller who
// says of which pages that mark means zeros (Blank). Two threads may both make a record,
// and a third copy what the kernel has mapped meanwhile: it is zeros for all of them, and
// the first to set the page's bit in Captured hands his on.
//
// What is left to the second fault is a page of shared memory that its file has and the
// process does not map, and a page that is just being moved.
//
// # What is not seen
//
// Pages pinned by other means, writes of other processes (process_vm_writev), direct I/O
// to block devices, pages that the fault itself fetches from swap, and whatever KVM writes
// by an address of its own (kvmclock). Hence a record for each page is never assumed: the
// caller checks which pages lost their mark (uffd/pagemap) and that each of them has its
// record.
//
// # Life cycle
//
// Load loads the programs for given ranges; Attach is told the userfaultfd (any
// process's, held by this one) whose address space to watch, learns what the programs
// need to know of it, and attaches them. SetMode switches between nothing, tracking
// (dirty bits only) and capturing. Records are read by Next and given back by Advance.
// Nothing is pinned: when the process ends, however it does, the kernel drops programs,
// maps and what the ring held.
//
// # Concurrency
//
// Next and Advance belong to one thread; they neither allocate nor enter the Go
// scheduler. All else may be called from any goroutine. Close comes last.
//
// # Failure modes
//
// Load and Attach fail with an *load.Error that says what this kernel lacks. Losses
// counts, by reason, how often a page was about to be written and was not copied.
package cow
