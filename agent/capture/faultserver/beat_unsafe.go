package faultserver

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// heartbeat leaves our sign of life from a thread of its own. It waits in bare
// system calls: a Go timer would depend on a scheduler whose threads all sit in
// other bare system calls, and a beat that comes late costs the checkpoint.
type heartbeat struct {
	stop   int // eventfd
	thread sync.WaitGroup
}

func startHeartbeat(beat func()) (*heartbeat, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	h := &heartbeat{stop: fd}
	h.thread.Go(func() { h.run(beat) })
	return h, nil
}

func (h *heartbeat) run(beat func()) {
	runtime.LockOSThread() // the thread ends with us, and its priority with it
	realtime()
	fds := []unix.PollFd{{Fd: int32(h.stop), Events: unix.POLLIN}}
	for {
		beat()
		wait := unix.NsecToTimespec(int64(beatEvery / time.Nanosecond))
		n, _, errno := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), 1,
			uintptr(unsafe.Pointer(&wait)), 0, 0, 0)
		if errno == 0 && n > 0 || errno != 0 && errno != unix.EINTR {
			return
		}
	}
}

func (h *heartbeat) close() error {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	if _, err := unix.Write(h.stop, one[:]); err != nil {
		return fmt.Errorf("stop the heartbeat: %w", err)
	}
	h.thread.Wait()
	return unix.Close(h.stop)
}

// realtime puts the calling thread, which must be locked, before all ordinary
// ones: a guest or the guardian waits for it, and it works for microseconds at a
// time. Best effort: without the right to it the process is a little slower.
func realtime() {
	const fifo = 1 // SCHED_FIFO
	prio := int32(1)
	_, _, _ = unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, 0, fifo, uintptr(unsafe.Pointer(&prio)))
}
