// Package guestagent speaks to qemu-ga, the agent that may run inside a guest, over
// the virtio-serial port QEMU offers it: freeze and thaw of its file systems, and its
// clock.
//
// A guest may run anything: everything that comes from it is bounded, in bytes and
// in time, and an agent that does not answer is an error and never a wait.
//
// # Life cycle
//
// Find asks QEMU which socket leads to the agent; Dial connects and gets in step
// with it (guest-sync-delimited), because half a conversation of somebody else may be
// on the wire. A Client runs one command at a time and is closed by its owner. QEMU
// serves one client a socket: one that libvirt holds is problem.Busy.
//
// # Who thaws
//
// A guest that stays frozen hangs. Before a freeze StartGuard starts a small process
// of its own session and control group that shares the connection. When whoever froze
// the guest ends without a word, or the time is over, it sends the thaw. Two thaws do
// no harm. The guard itself ends when it was released or has thawed.
package guestagent
