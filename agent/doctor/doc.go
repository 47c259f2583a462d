// Package doctor says what this host offers ckagent, which engine a VM would get
// on it, what every gap costs and how to mend it.
//
// It works in two steps. Gather collects Facts by trying things out: it makes
// userfaultfds, registers memory of its own, loads tiny BPF programs, runs a few
// instructions in a virtual machine, syncs a nameless file in the store. Judge is
// a pure function from Facts to a Report; all knowledge about what matters is
// there, so that every gap can be tested without a host that has it. Text and
// JSON are two renderings of the same Report.
//
// Nothing on the host is changed: no file stays, no sysctl is touched, no module
// is loaded by our wish (opening a device may make the kernel load one). Nothing
// is done to any VM.
//
// Gather never fails as a whole: what could not be found out is itself a fact,
// with its error. Each step that could hang (the store, a QEMU binary, KVM) has a
// deadline. A store that does not answer even then leaves one goroutine behind in
// an uninterruptible system call; it ends when the store comes back, or with the
// process.
package doctor
