package uffd

import (
	"errors"
	"os"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const page = 4096

// memory is a mapping of this process that tests fault on. It is touched only
// from within system calls: a goroutine that faulted directly could not be
// stopped for a garbage collection, which would then wait for the very goroutine
// that serves the fault.
type memory struct {
	t    *testing.T
	b    []byte
	pipe *os.File // a memfd as source and sink of the accesses
}

func newMemory(t *testing.T, fd int, length, flags int) *memory {
	t.Helper()
	b, err := unix.Mmap(fd, 0, length, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatalf("mmap: %v", err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	mfd, err := unix.MemfdCreate("touch", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(mfd), "touch")
	t.Cleanup(func() { f.Close() })
	return &memory{t: t, b: b, pipe: f}
}

func anonymous(t *testing.T, length int) *memory {
	return newMemory(t, -1, length, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
}

func memfd(t *testing.T, length int) (*memory, int) {
	t.Helper()
	fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, int64(length)); err != nil {
		t.Fatal(err)
	}
	return newMemory(t, fd, length, unix.MAP_SHARED), fd
}

func (m *memory) addr() uint64 { return uint64(uintptr(unsafe.Pointer(&m.b[0]))) }
func (m *memory) len() uint64  { return uint64(len(m.b)) }

// write stores data at off by a kernel-mode access; it waits in the fault.
func (m *memory) write(off int, data []byte) error {
	if _, err := m.pipe.WriteAt(data, int64(off)); err != nil {
		return err
	}
	n, err := m.pipe.ReadAt(m.b[off:off+len(data)], int64(off))
	if err == nil && n != len(data) {
		err = errors.New("short")
	}
	return err
}

// read copies n bytes at off out by a kernel-mode access.
func (m *memory) read(off, n int) ([]byte, error) {
	if _, err := m.pipe.WriteAt(m.b[off:off+n], 1<<30); err != nil {
		return nil, err
	}
	out := make([]byte, n)
	_, err := m.pipe.ReadAt(out, 1<<30)
	return out, err
}

func (m *memory) mustWrite(off int, data []byte) {
	m.t.Helper()
	if err := m.write(off, data); err != nil {
		m.t.Fatal(err)
	}
}

func open(t *testing.T, want Features) *Handle {
	t.Helper()
	f, err := New(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	h, err := Adopt(f, want)
	if errors.Is(err, ErrUnsupported) {
		t.Skipf("kernel too old: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// next waits for the next message, at most 5 s.
func next(t *testing.T, h *Handle) Msg {
	t.Helper()
	stop, err := NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	timer := time.AfterFunc(5*time.Second, func() { _ = stop.Signal() })
	defer timer.Stop()
	for {
		if err := h.Wait(stop); err != nil {
			t.Fatalf("no message: %v", err)
		}
		var m [1]Msg
		_, err := h.Read(m[:])
		if errors.Is(err, ErrAgain) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return m[0]
	}
}

func async(f func() error) <-chan error {
	c := make(chan error, 1)
	go func() { c <- f() }()
	return c
}

func wait(t *testing.T, c <-chan error) {
	t.Helper()
	select {
	case err := <-c:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the faulting thread was not woken")
	}
}
