// Package pagemap reads /proc/PID/pagemap: which pages are there, and which
// were written since they were write-protected (PAGEMAP_SCAN, Linux 6.7; plain
// entries before, slower and without re-arming). Set is a page bitmap to keep
// the answers in.
//
// # What "still armed" proves
//
// A capture copies a page and asks afterwards whether it still carries the
// write-protect mark it was given at the arm. If so, nobody has stored to it
// through the target's mapping in between, so that the copy is the content of
// the arm. The question must be asked as AllArmed or, for pages that had content,
// as AllIntact. To ask for pages reported as written is not enough: many kernels
// (6.7 until a fix that reached the stable series during 6.18) report nothing
// where a whole page table is missing, which is what discarding a huge page
// leaves behind. The tests of this package establish every line:
//
//	memory at the arm                        event                          reported   AllArmed  AllIntact
//	anonymous, memfd, tmpfs private, present store of the target            fault      false     false
//	                                         process_vm_writev of others    fault      false     false
//	                                         read, mprotect                 -          true      true
//	                                         paged out                      -          true      false until paged in
//	absent, with WP_UNPOPULATED or file      read: zeros or file mapped     -          true      file only
//	  (whole 2 GiB: 4 MiB of page tables)    store                          fault      false     false
//	absent anonymous, no WP_UNPOPULATED      any                            -          false     false
//	huge page, huge zero page, armed whole   store splits that 2 MiB        fault      false for the 4 KiB stored to, true beside
//	anonymous                                MADV_DONTNEED                  -          false     false
//	                                         MADV_FREE (until reclaimed)    -          true      true
//	                                         unmapped, mapped anew          -          false     false
//	                                         merged with equal pages (KSM)  -          false     false
//	tmpfs private, own copy of the page      MADV_DONTNEED: file shows      -          TRUE      false
//	memfd shared                             MADV_DONTNEED: content stays   -          true      true once read
//	                                         punched hole, MADV_REMOVE      -          TRUE      TRUE once read
//	                                         write(2) to the file           -          TRUE      TRUE
//	                                         store by another mapping, or
//	                                         by a forked child              -          TRUE      TRUE
//	private, target forks                    child stores: not our content  -          true      true
//
// The capital lines are where the mark stays although content changed. They ask
// for other measures: memory that other processes map is refused; discards by
// madvise announce themselves if FeatureEventRemove is negotiated (the target
// then waits until the message is read), and QEMU's own balloon does: it
// punches the hole first and calls MADV_DONTNEED right after, both under its
// big lock, so that one command answered by its monitor after the last copy
// proves that no announcement is outstanding. Direct I/O that pinned a page
// before the arm writes past every mark: arm only while the disks are flushed
// and the machine is stopped.
//
// All of it holds on Linux 6.18 and, without WP_UNPOPULATED, WP_ASYNC and
// PAGEMAP_SCAN, on 6.1, with one exception: on 6.1 MADV_COLLAPSE answers EINVAL
// for a huge page that was split while armed, also after it was let go (one split
// by mprotect it makes whole).
//
// # Concurrency and life cycle
//
// A Pagemap is one descriptor bound to the address space the process had when it
// was opened; all methods may run at once, Close comes last. Set has one owner
// at a time. Methods ending in Raw are bare system calls without allocation, for
// locked threads.
//
// # Failure modes
//
// ErrGone once the process has exited (never an answer about another process
// with the same pid), ErrUnsupported where PAGEMAP_SCAN is missing, EPERM
// without the right to trace the target.
package pagemap
