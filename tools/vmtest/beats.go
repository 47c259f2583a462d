package vmtest

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Beat is one heartbeat of the guest.
type Beat struct {
	Number byte      // counts up by one, modulo 256
	At     time.Time // when QEMU's vCPU thread sent it, by the host's wall clock
}

// Beats collects heartbeats: the guest writes a byte to port 0xe9, QEMU's
// isa-debugcon sends it as a datagram over loopback, and the kernel stamps it as
// it is queued, still in the vCPU thread. When this process gets to read it does
// not matter, so the longest time between two beats is the longest silence of
// that vCPU. Each beat costs it one sendto.
type Beats struct {
	fd   int
	port int
	wake int // eventfd that ends the reader
	done chan struct{}
	stop sync.Once

	mu    sync.Mutex
	beats []Beat
	lost  int
	err   error
}

// maxBeats bounds what is kept (an hour of 1 ms beats); the oldest half goes.
const maxBeats = 1 << 22

// ListenBeats opens a UDP port on loopback and collects until Close.
func ListenBeats() (*Beats, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("beat socket: %w", err)
	}
	b := &Beats{fd: fd, wake: -1, done: make(chan struct{})}
	fail := func(err error) (*Beats, error) {
		unix.Close(fd)
		return nil, fmt.Errorf("beat socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
		return fail(err)
	}
	// Room for some seconds in which nobody reads; FORCE needs privilege.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 32<<20)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return fail(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return fail(err)
	}
	b.port = sa.(*unix.SockaddrInet4).Port
	if b.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fail(err)
	}
	go b.read()
	return b, nil
}

// Port is the UDP port on 127.0.0.1.
func (b *Beats) Port() int { return b.port }

func (b *Beats) read() {
	defer close(b.done)
	fds := []unix.PollFd{{Fd: int32(b.fd), Events: unix.POLLIN}, {Fd: int32(b.wake), Events: unix.POLLIN}}
	data, oob := make([]byte, 2048), make([]byte, 256)
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			b.fail(err)
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		for {
			n, oobn, _, _, err := unix.Recvmsg(b.fd, data, oob, 0)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				b.fail(err)
				return
			}
			at, ok := stampOf(oob[:oobn])
			if !ok || n == 0 {
				continue
			}
			b.add(data[:n], at)
		}
	}
}

func (b *Beats) fail(err error) {
	b.mu.Lock()
	b.err = err
	b.mu.Unlock()
}

// add takes a datagram; QEMU may put several bytes into one, which then are of
// the same moment.
func (b *Beats) add(numbers []byte, at time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, n := range numbers {
		if k := len(b.beats); k > 0 {
			b.lost += int(n - b.beats[k-1].Number - 1) // modulo 256
		}
		b.beats = append(b.beats, Beat{Number: n, At: at})
	}
	if len(b.beats) > maxBeats {
		b.beats = slices.Clone(b.beats[len(b.beats)/2:])
	}
}

// Lost is how many beats were sent but not received (modulo 256 each time): if
// it is not zero, a gap may be an artefact. A restored guest repeats numbers,
// which counts here too.
func (b *Beats) Lost() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.lost
}

// Between returns the beats of a span of time.
func (b *Beats) Between(from, to time.Time) []Beat {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []Beat
	for _, x := range b.beats {
		if !x.At.Before(from) && !x.At.After(to) {
			out = append(out, x)
		}
	}
	return out
}

// LongestGap is the longest time without a beat between from and to, and when it
// began. The beat before from and the one after to bound the first and last gap,
// so a span without any beat is one long gap. ok is false without two beats.
func (b *Beats) LongestGap(from, to time.Time) (gap time.Duration, began time.Time, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i := 1; i < len(b.beats); i++ {
		x, y := b.beats[i-1].At, b.beats[i].At
		if y.Before(from) || x.After(to) {
			continue
		}
		if ok = true; y.Sub(x) > gap {
			gap, began = y.Sub(x), x
		}
	}
	return gap, began, ok
}

// Close ends the collection; what was collected can still be asked for.
func (b *Beats) Close() error {
	b.stop.Do(func() {
		one := [8]byte{1}
		_, _ = unix.Write(b.wake, one[:])
		<-b.done
		unix.Close(b.fd)
		unix.Close(b.wake)
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}
