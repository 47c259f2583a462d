package heartbeat

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

// Heart is a beating thread.
type Heart struct {
	stop   int // eventfd
	thread sync.WaitGroup
}

// Start calls beat at once and then every so often until Stop. beat must neither
// block nor enter the Go scheduler: store to memory, read the clock by NowNS.
func Start(every time.Duration, beat func()) (*Heart, error) {
	return start(every, beat, false)
}

// StartPinned is Start in a process that collects no garbage: there the thread need
// not heed the Go scheduler at all (see Pin).
func StartPinned(every time.Duration, beat func()) (*Heart, error) {
	return start(every, beat, true)
}

func start(every time.Duration, beat func(), pinned bool) (*Heart, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("heartbeat: eventfd: %w", err)
	}
	h := &Heart{stop: fd}
	h.thread.Go(func() { h.run(every, beat, pinned) })
	return h, nil
}

func (h *Heart) run(every time.Duration, beat func(), pinned bool) {
	runtime.LockOSThread() // the thread ends with us, and its priority with it
	Realtime()
	if pinned {
		Pin()
		defer Unpin()
	}
	fds := []unix.PollFd{{Fd: int32(h.stop), Events: unix.POLLIN}}
	for {
		beat()
		if stopped(fds, every) {
			return
		}
	}
}

// stopped waits. It is not inlined: its prologue is where a process that collects
// garbage stops this thread, woken by the scheduler's signal.
//
//go:noinline
func stopped(fds []unix.PollFd, every time.Duration) bool {
	wait := unix.NsecToTimespec(every.Nanoseconds())
	n, _, errno := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), 1,
		uintptr(unsafe.Pointer(&wait)), 0, 0, 0)
	return errno == 0 && n > 0 || errno != 0 && errno != unix.EINTR
}

// Stop ends the thread.
func (h *Heart) Stop() error {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	if _, err := unix.Write(h.stop, one[:]); err != nil {
		return fmt.Errorf("heartbeat: stop: %w", err)
	}
	h.thread.Wait()
	return unix.Close(h.stop)
}

// NowNS is CLOCK_MONOTONIC in nanoseconds, without entering the scheduler.
func NowNS() int64 {
	var ts unix.Timespec
	// It cannot fail: the clock exists and the pointer is good.
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, uintptr(unsafe.Pointer(&ts)), 0)
	return ts.Nano()
}

// Realtime puts the calling thread, which must be locked, before all ordinary ones:
// somebody waits for it, and it works for microseconds at a time. Threads that it
// starts are ordinary again. Best effort: without the right to it the process is a
// little slower.
func Realtime() { RealtimeOf(0) }

// RealtimeOf is Realtime for another thread, which Ordinary ends.
func RealtimeOf(tid int) { setPolicy(tid, 1, 1) } // SCHED_FIFO

// Ordinary makes the calling thread an ordinary one again, as nice as it was.
func Ordinary() { setPolicy(0, 0, 0) } // SCHED_OTHER

func setPolicy(tid int, policy uintptr, priority int32) {
	const resetOnFork = 1 << 30 // SCHED_RESET_ON_FORK
	_, _, _ = syscall.RawSyscall(unix.SYS_SCHED_SETSCHEDULER, uintptr(tid), policy|resetOnFork, uintptr(unsafe.Pointer(&priority)))
}
