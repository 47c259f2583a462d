// Package pager brings the memory of a restored process in, page by page, while it
// runs: the pages its threads ask for at once, all others in the background; and
// then lets go of it so that nothing of us remains attached.
//
// # Processes
//
// Two small processes in sessions and cgroups of their own: the worker (Main) holds
// the userfaultfd, serves faults and drains; the supervisor (SuperviseMain) replaces
// a worker that died or froze. The worker replaces the supervisor in the same way.
// They share one page of atomics, the control memory: who they are, signs of life,
// phase and counters. The starter (Process) only looks at it; it may go away at any
// time, also without having called Release: a drain on hold then begins by itself.
// Both dying or freezing at once is mended by the starter if it is still there, else
// by Resume. The supervisor also holds the source (Keeper), so that it is not removed
// while there is no worker.
//
// # Life cycle
//
// Prestart (optional, overlaps with the start of the process to be served), Start:
// eager blocks are written, lazy ones registered for missing faults, and it is
// proved by pagemap and by a look at the files behind that nothing is present yet.
// From then on a page appears in that memory only by UFFDIO_COPY or UFFDIO_ZEROPAGE
// of verified content, each atomic: so whoever takes over from a dead worker learns
// from pagemap what is there, and one UFFDIO_WAKE over everything makes swallowed
// faults come again. Two workers at a time do no harm: neither can place anything
// that is not right, and who comes second gets EEXIST.
//
// When every page that has content is in, the blocks are unregistered: what is left
// reads as zeros, which is what those pages are recorded as; they never take memory.
// Then the descriptor inside the process is closed and huge pages are asked for.
// Until then the descriptor stays open inside: closing the last one of a range that
// is not all in would make the guest read zeros.
//
// # Concurrency
//
// In the worker: fault threads (locked, real-time, no allocation) share the set of
// needed pages (order.Need) with the drainers without a lock; planMu guards the
// planner alone and is never held across I/O. Bad pages go through a bounded queue
// to one retrier, which owns their trials; the worker's mu guards the state file.
// Fault threads never wait for the drain: it works in small pieces while faults come
// in, at lower priority, and copies of different pages do not exclude each other.
// All goroutines are joined before Main returns, but for a read of the source that
// cannot be cancelled.
//
// # Failure modes
//
// A page that fails its checksum or cannot be read is tried again a bounded number
// of times and then left out: who touches it waits (or, by Config.BadPage, gets a
// memory error); it is never filled. Everything else goes on; Wait reports it. The
// phase stays damaged, the descriptor open, until Retry or Resume finds the page
// whole. If the process ends, so do worker and supervisor.
//
// Memory must be private anonymous or shared memory that nothing was ever written
// to, in 4 KiB pages. Pages that the guest gives back while being paged in
// (balloon) may come again with their old content, which such a guest must expect.
//
// Files in the run directory: pager.json (configuration, phase, damage), pager.pids,
// pager.log, pager.lock; all 0600.
package pager
