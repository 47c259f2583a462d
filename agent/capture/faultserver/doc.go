// Package faultserver is the small process that holds a VM's write-protect
// userfaultfd: it arms guest RAM, serves the faults of the guest's writes, scans
// what the guest did not touch, and hands everything to the agent through an
// arena. It does no disk I/O and waits for nobody who does, so that neither a
// slow store nor a frozen agent can hold up the guest.
//
// There are two engines. With the synchronous one the guest's writes wait for a thread
// of ours; what follows describes it. With the kernel's (type kernelEngine) programs in
// the kernel copy pages on the way, and nothing waits; it has the same life of a capture.
//
// # Life of the process
//
// It is launched knowing of no VM, gets ready for what the agent expects, and waits. Then
// comes the configuration, with the files that belong to it, and one capture; after that it
// ends. It ends as well when the agent's end of the socket is closed or the agent dies.
//
// # Life of a capture
//
//	idle      -> Prearm: take a userfaultfd from QEMU, register, arm everything
//	             while the guest runs; re-arm what it writes until little is left
//	tracking  faults are let through: the pages are remembered as dirty
//	          -> Freeze, while the guest is stopped and its device state saved:
//	             re-arm the dirty pages; from here on memory is the checkpoint's
//	capturing faults and scan copy each page before it can change
//	          -> every page captured: let go
//	released  nothing of ours is left in the guest's memory
//
// Abort, the agent's death, a proof that fails and a stall lead from anywhere to
// released. Letting go is unregistering: the kernel drops every protection and
// wakes every waiting thread.
//
// # Life of a page
//
// See pageTable. A page is claimed by exactly one thread; the thread copies it,
// then proves by the page table that it was still protected after the copy, then
// lifts the protection. What is protected after the copy was not written and not
// discarded before it, so the copy is what the page held when it was armed.
//
// # Concurrency
//
// The command loop owns the phase, and joins the scanners. The fault threads block
// in read(2) and end with the process. Each fault thread and the scanner owns one
// ring of the arena. A fault thread holds its own mutex while it works on
// messages; Freeze holds all of them while it re-arms and changes the phase, so
// a message is either finished before the freeze or served after it. Lock order:
// fault threads by index; nothing is locked inside them.
//
// A vCPU waits for a fault thread, and for a scanner that has claimed the page it
// wants. So fault threads run in real time and lend that to such a scanner until the
// page is done, and neither is ever left to the Go scheduler while somebody may wait
// (heartbeat.Pin). Everything else of the process comes after the guest, but for the
// moments around the freeze and the release. No system call arms or lets go of more
// than some MiB, because a vCPU may have to wait for its end.
//
// With the kernel's engine there is one reader of its ring, in real time, because what
// does not fit there is lost, and the scanners; neither holds up anybody. Pages are
// claimed after they were proved, by whoever comes first. The reader alone ends a stop
// of the guest by the programs' signal, except when everything ends.
//
// With Config.Keep a capture that succeeds ends without letting go: the marks, which hold
// up nobody with the kernel's engine, belong to whoever has a descriptor of the
// userfaultfd, and the next server is given it and Config.Kept. See kept.go.
//
// The process runs without garbage collection and with its memory locked: it
// allocates only while it is set up.
//
// # Failure modes
//
// If this process dies, the kernel closes the userfaultfd, which drops all
// protection: the guest goes on, the checkpoint is lost. The agent sees it by the
// end of the socket. If the agent dies, the server lets go and exits.
package faultserver
