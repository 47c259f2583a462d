package uffd

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Read reads up to len(msgs) messages: at least one if the descriptor is
// blocking, ErrAgain if it is not and there are none. EINTR is retried.
func (h *Handle) Read(msgs []Msg) (int, error) {
	if len(msgs) == 0 {
		return 0, opError("read", 0, 0, unix.EINVAL)
	}
	n, errno := h.read(msgs)
	if errno == 0 {
		return n, nil
	}
	err := opError("read", 0, 0, errno).(*OpError)
	if errno == unix.EINVAL {
		err.Detail = "the handshake was not done"
	}
	return 0, err
}

// Stop ends a Wait from another goroutine: an eventfd that, once signalled,
// stays so. The zero value is not usable.
type Stop struct {
	fd atomic.Int64
}

// NewStop opens a Stop.
func NewStop() (*Stop, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	s := &Stop{}
	s.fd.Store(int64(fd))
	return s, nil
}

// Signal makes every present and later Wait return ErrStopped.
func (s *Stop) Signal() error {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	// EAGAIN: the counter is at its maximum, hence signalled already.
	if _, err := unix.Write(int(s.fd.Load()), one[:]); err != nil && err != unix.EAGAIN {
		return fmt.Errorf("signal eventfd: %w", err)
	}
	return nil
}

// FD is the descriptor, for callers with a poll set of their own.
func (s *Stop) FD() int { return int(s.fd.Load()) }

// Close closes the eventfd; no Wait may be using it.
func (s *Stop) Close() error {
	fd := s.fd.Swap(-1)
	if fd < 0 {
		return nil
	}
	if err := unix.Close(int(fd)); err != nil {
		return fmt.Errorf("close eventfd: %w", err)
	}
	return nil
}

// Wait blocks until a message can be read (nil), stop is signalled (ErrStopped)
// or one of also, typically the pidfd of the target, becomes readable (ErrGone:
// a userfaultfd itself never says that its address space ended). A readable
// message may be gone by the time it is read, if the waiting thread was killed
// or woken: Read then answers ErrAgain.
func (h *Handle) Wait(stop *Stop, also ...int) error {
	var arr [6]unix.PollFd
	fds := append(arr[:0], unix.PollFd{Fd: int32(h.fd.Load()), Events: unix.POLLIN},
		unix.PollFd{Fd: int32(stop.FD()), Events: unix.POLLIN})
	for _, fd := range also {
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	for {
		_, err := unix.Poll(fds, -1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("userfaultfd poll: %w", err)
		}
		switch {
		case fds[1].Revents != 0:
			return ErrStopped
		case fds[0].Revents&unix.POLLNVAL != 0:
			return ErrClosed
		case fds[0].Revents&unix.POLLIN != 0:
			return nil
		case fds[0].Revents&unix.POLLERR != 0:
			// The kernel answers so when the descriptor is blocking or the
			// handshake is missing; Adopt excludes the latter.
			return &OpError{Op: "poll", Errno: unix.EINVAL, Detail: "the descriptor is blocking (SetNonblock) or was never negotiated"}
		}
		for _, p := range fds[2:] {
			if p.Revents != 0 {
				return ErrGone
			}
		}
	}
}
