// Package oldkernel runs ckagent on a Linux kernel that is older than the one of
// this machine: the one Debian 12 ships, 6.1, which lacks much of what newer ones
// offer for tracking memory.
//
// # How
//
// Boot starts a machine under emulation from that kernel and an initramfs made on
// the spot: the ckagent binary under test, a static busybox, this machine's QEMU
// with the libraries that ldd names, and the multiboot guest. Nothing is
// installed and there is no disk. Init is a small shell script that takes
// commands from the second serial port, one a line, and answers with the exit
// code, the output and what went to stderr; Host.Run is the other end of it. VMs
// inside are emulated by an emulated machine: they are slow, so they are small.
//
// # Life cycle
//
// Boot returns once init has answered; Close kills the machine by the process
// Boot started and waits for it. A Host is used by one goroutine at a time.
//
// # Failure
//
// A machine that panics or hangs shows as an error of Boot or Run within the
// deadline of their context, and Console has the kernel's last words. A command
// that outlives its context ends the machine's usefulness: close it.
package oldkernel
