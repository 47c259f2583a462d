// Package affinity keeps background threads off the processors that a VM's vCPUs run
// on, as long as there are others.
//
// A scheduler that shares a processor between a vCPU and a thread that copies pages is
// fair to both, and that is the trouble: the guest is silent for whole time slices of
// some milliseconds, and on kernels without preemption for each of our longer system
// calls as well. Priorities help less than one would think, since a vCPU that never
// sleeps is not woken and so preempts nobody.
//
// # Use
//
// [Of] names the vCPUs once; each background thread makes a [Thread] of its own and
// calls [Thread.Keep] every now and then, since a vCPU may move. The thread must be
// locked to its goroutine and end with it: what it was restricted to is not taken back.
// A vCPU that does not run now does not count. Where the vCPUs take all processors that
// the thread may use, or nothing can be learned of them, it is not restricted at all.
//
// Nothing of the VM is changed. The package has no other state and cannot fail: without
// the right to set it, affinity stays as it is.
package affinity
