package pager

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/uffd"
)

// waiter lets one fault thread sleep until there is a fault. Every thread has an
// epoll of its own that is in the userfaultfd's queue exclusively: then a fault
// wakes one sleeping thread. With poll it wakes all of them, and those that find
// nothing have meanwhile taken the processor from the guest thread that was served.
type waiter struct{ ep int }

func newWaiter(h *uffd.Handle, stop *uffd.Stop) (*waiter, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	w := &waiter{ep}
	err = unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, int(h.FD()), &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLEXCLUSIVE, Fd: int32(h.FD())})
	if err == nil {
		err = unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, stop.FD(), &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(stop.FD())})
	}
	if err != nil {
		w.close()
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return w, nil
}

func (w *waiter) close() { _ = unix.Close(w.ep) }

// wait returns true when there may be a fault, false when told to stop.
func (w *waiter) wait(stop *uffd.Stop) (bool, error) {
	var ev [2]unix.EpollEvent
	for {
		n, err := unix.EpollWait(w.ep, ev[:], -1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("wait for faults: %w", err)
		}
		fault := false
		for _, e := range ev[:n] {
			if e.Fd == int32(stop.FD()) {
				return false, nil
			}
			if e.Events&unix.EPOLLIN == 0 {
				return false, fmt.Errorf("wait for faults: events %#x of the userfaultfd", e.Events)
			}
			fault = true
		}
		if fault {
			return true, nil
		}
	}
}
