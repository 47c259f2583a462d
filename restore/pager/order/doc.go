// Package order decides what a pager brings in next. It is pure: it knows page
// numbers and nothing of descriptors, images or time, so a transcript of faults
// and completions determines every decision.
//
// Two types. Need is the set of pages that still have to be brought in; fault
// threads settle pages in it and drainers search it at the same time, without a
// lock. Planner turns hot runs, recent faults and Need into the next run to
// fetch: first the pages known to be hot, then the neighbourhood of recent
// faults with a window that grows while faults keep landing there, then
// everything else in ascending order. Stream spots one vCPU walking through
// memory, so that a fault can be followed by a few pages at once.
//
// Concurrency: Need is safe for any number of goroutines. A Planner belongs to
// one caller at a time (its owner locks around it); it never blocks. A Stream
// belongs to one thread.
//
// Failure modes: none of its own. A page that cannot be fetched is Held; it stays
// needed, so Left never reaches zero behind the caller's back, and is not offered
// again until Release.
package order
