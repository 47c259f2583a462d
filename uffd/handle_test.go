package uffd

import (
	"bytes"
	"errors"
	"os"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestWriteProtect(t *testing.T) {
	h := open(t, FeaturePagefaultFlagWP|FeatureThreadID)
	m := anonymous(t, 8*page)
	for i := range 8 {
		m.mustWrite(i*page, []byte{byte(i + 1)})
	}
	io, err := h.Register(m.addr(), m.len(), ModeWP)
	if err != nil {
		t.Fatal(err)
	}
	if !io.Has(IoctlWriteProtect | IoctlWake) {
		t.Fatalf("ioctls %#x", io)
	}
	if err := h.WriteProtect(m.addr(), m.len()); err != nil {
		t.Fatal(err)
	}
	if b, err := m.read(3*page, 1); err != nil || b[0] != 4 {
		t.Fatalf("reading an armed page: %v %v", b, err)
	}
	var tid int
	done := async(func() error {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid = unix.Gettid()
		return m.write(3*page+17, []byte{0xee})
	})
	msg := next(t, h)
	if msg.Event != EventPagefault || msg.Flags != FaultWrite|FaultWP || msg.Address != m.addr()+3*page {
		t.Fatalf("message %+v", msg)
	}
	info, err := h.Info()
	if err != nil || info.Pending != 0 || info.Waiting != 1 || !info.Features.Has(FeaturePagefaultFlagWP) {
		t.Fatalf("info %+v %v", info, err)
	}
	// Without wake the writer sleeps on although the mark is gone.
	if err := h.Unprotect(m.addr()+3*page, page, false); err != nil {
		t.Fatal(err)
	}
	if info, err = h.Info(); err != nil || info.Waiting != 1 {
		t.Fatalf("after unprotect without wake: %+v %v", info, err)
	}
	if err := h.Wake(m.addr()+3*page, page); err != nil {
		t.Fatal(err)
	}
	wait(t, done)
	if int(msg.ThreadID) != tid {
		t.Errorf("thread %d, message says %d", tid, msg.ThreadID)
	}
	if m.b[3*page+17] != 0xee || m.b[4*page] != 5 {
		t.Error("content")
	}
	done = async(func() error { return m.write(5*page, []byte{9}) })
	msg = next(t, h)
	if errno := h.UnprotectRaw(msg.Address, page, true); errno != 0 {
		t.Fatal(errno)
	}
	wait(t, done)
	if err := h.Unregister(m.addr(), m.len()); err != nil {
		t.Fatal(err)
	}
	m.mustWrite(6*page, []byte{1})
}

func TestMissing(t *testing.T) {
	for _, kind := range []string{"anonymous", "memfd"} {
		t.Run(kind, func(t *testing.T) {
			h := open(t, FeatureMissingShmem)
			m := anonymous(t, 16*page)
			if kind == "memfd" {
				m, _ = memfd(t, 16*page)
			}
			io, err := h.Register(m.addr(), m.len(), ModeMissing)
			if err != nil {
				t.Fatal(err)
			}
			if !io.Has(IoctlCopy | IoctlZeroPage | IoctlWake) {
				t.Fatalf("ioctls %#x", io)
			}
			src := bytes.Repeat([]byte("ckagent!"), 3*page/8)
			var got []byte
			done := async(func() (err error) { got, err = m.read(2*page, 16); return })
			msg := next(t, h)
			if msg.Address != m.addr()+2*page || msg.Flags != 0 {
				t.Fatalf("message %+v", msg)
			}
			if n, err := h.Copy(m.addr()+2*page, src[:page], 0); n != page || err != nil {
				t.Fatal(n, err)
			}
			wait(t, done)
			if !bytes.Equal(got, src[:16]) {
				t.Fatalf("read %q", got)
			}

			// A copy that runs into an existing page: a prefix, ErrExists, and
			// the waiter behind it woken to fault again.
			done = async(func() (err error) { got, err = m.read(3*page, 8); return })
			msg = next(t, h)
			if msg.Address != m.addr()+3*page {
				t.Fatalf("message %+v", msg)
			}
			n, err := h.Copy(m.addr()+page, src, 0)
			if n != page || !errors.Is(err, ErrExists) || !errors.Is(err, unix.EEXIST) {
				t.Fatalf("copied %d: %v", n, err)
			}
			if msg = next(t, h); msg.Address != m.addr()+3*page {
				t.Fatalf("the waiter did not fault again: %+v", msg)
			}
			if n, err := h.ZeroPage(m.addr()+3*page, 2*page, 0); n != 2*page || err != nil {
				t.Fatal(n, err)
			}
			wait(t, done)
			if !bytes.Equal(got, make([]byte, 8)) {
				t.Fatalf("read %q", got)
			}
			if n, err := h.ZeroPage(m.addr()+4*page, page, 0); n != 0 || !errors.Is(err, ErrExists) {
				t.Fatal(n, err)
			}
			if n, errno := h.CopyRaw(m.addr()+6*page, unsafe.Pointer(&src[0]), page, CopyDontWake); n != page || errno != 0 {
				t.Fatal(n, errno)
			}
			if n, errno := h.CopyRaw(m.addr()+6*page, unsafe.Pointer(&src[0]), page, 0); n != 0 || errno != unix.EEXIST {
				t.Fatal(n, errno)
			}
			if n, errno := h.ZeroPageRaw(m.addr()+7*page, page, 0); n != page || errno != 0 {
				t.Fatal(n, errno)
			}
			if _, err := h.Copy(m.addr()+1, src[:page], 0); !errors.Is(err, unix.EINVAL) {
				t.Fatal(err)
			}
			if _, err := h.Copy(m.addr(), nil, 0); !errors.Is(err, unix.EINVAL) {
				t.Fatal(err)
			}
			if errno := h.WakeRaw(m.addr(), m.len()); errno != 0 {
				t.Fatal(errno)
			}
		})
	}
}

// TestCopyWaitsForEvent: while an event is unread the kernel answers EAGAIN; a
// reader elsewhere resolves it and Copy goes through; with nobody reading it
// gives up with ErrAgain instead of hanging.
func TestCopyWaitsForEvent(t *testing.T) {
	h := open(t, FeatureEventRemove)
	m := anonymous(t, 4*page)
	if _, err := h.Register(m.addr(), m.len(), ModeMissing); err != nil {
		t.Fatal(err)
	}
	src := make([]byte, page)
	done := async(func() error { return unix.Madvise(m.b[page:2*page], unix.MADV_DONTNEED) })
	stop, err := NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	if err := h.Wait(stop); err != nil {
		t.Fatal(err)
	}
	if n, err := h.Copy(m.addr(), src, 0); n != 0 || !errors.Is(err, ErrAgain) {
		t.Fatalf("%d %v", n, err)
	}
	msg := next(t, h)
	if s, e := msg.Removed(); msg.Event != EventRemove || s != m.addr()+page || e != m.addr()+2*page {
		t.Fatalf("%+v", msg)
	}
	if n, err := h.Copy(m.addr(), src, 0); n != page || err != nil {
		t.Fatalf("%d %v", n, err)
	}
	wait(t, done)
}

func TestMinorAndPoison(t *testing.T) {
	h := open(t, FeatureMinorShmem|FeaturePoison)
	m, fd := memfd(t, 8*page)
	if _, err := unix.Pwrite(fd, []byte("in the cache"), 2*page); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Register(m.addr(), m.len(), ModeMinor|ModeMissing); err != nil {
		t.Fatal(err)
	}
	var got []byte
	done := async(func() (err error) { got, err = m.read(2*page, 12); return })
	if msg := next(t, h); msg.Flags&FaultMinor == 0 || msg.Address != m.addr()+2*page {
		t.Fatalf("%+v", msg)
	}
	if n, err := h.Continue(m.addr()+2*page, page, 0); n != page || err != nil {
		t.Fatal(n, err)
	}
	wait(t, done)
	if string(got) != "in the cache" {
		t.Fatalf("%q", got)
	}
	if _, err := h.Continue(m.addr()+3*page, page, 0); !errors.Is(err, unix.EFAULT) {
		t.Fatalf("continue without a page: %v", err)
	}
	if n, err := h.Poison(m.addr()+4*page, page, 0); n != page || err != nil {
		t.Fatal(n, err)
	}
	// From kernel mode poison reads as EFAULT instead of SIGBUS.
	if _, err := m.read(4*page, 1); !errors.Is(err, unix.EFAULT) && !errors.Is(err, unix.EHWPOISON) {
		t.Fatalf("poisoned page: %v", err)
	}
}

func TestResume(t *testing.T) {
	h := open(t, FeatureThreadID|FeatureEventRemove)
	dup := func() *os.File {
		fd, err := unix.FcntlInt(uintptr(h.FD()), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "dup")
	}
	if _, err := Adopt(dup(), 0); err == nil {
		t.Fatal("a second handshake went through")
	}
	r, err := Resume(dup())
	if err != nil {
		t.Fatal(err)
	}
	if r.Features() != h.Features() {
		t.Errorf("features %v, were %v", r.Features(), h.Features())
	}
	if fl, err := unix.FcntlInt(uintptr(h.FD()), unix.F_GETFL, 0); err != nil || fl&unix.O_NONBLOCK == 0 {
		t.Error("O_NONBLOCK was lost")
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Wake(0x1000, page); !errors.Is(err, ErrClosed) {
		t.Fatalf("%v", err)
	}
	f, err := New(unix.O_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Resume(f); err == nil {
		t.Fatal("resumed without a handshake")
	}
}

// TestReadSeveral: one read takes all pending messages that fit.
func TestReadSeveral(t *testing.T) {
	h := open(t, FeaturePagefaultFlagWP)
	m := anonymous(t, 8*page)
	if _, err := h.Register(m.addr(), m.len(), ModeMissing); err != nil {
		t.Fatal(err)
	}
	var buf [8]Msg
	if _, err := h.Read(buf[:]); !errors.Is(err, ErrAgain) {
		t.Fatal(err)
	}
	if _, errno := h.ReadRaw(buf[:]); errno != unix.EAGAIN {
		t.Fatal(errno)
	}
	if _, err := h.Read(nil); err == nil {
		t.Fatal("read into nothing")
	}
	var done []<-chan error
	for i := range 3 {
		// Each with a sink of its own: writers of one file take turns.
		sink, err := unix.MemfdCreate("sink", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(sink)
		done = append(done, async(func() error { _, err := unix.Pwrite(sink, m.b[i*page:i*page+1], 0); return err }))
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		in, err := h.Info()
		if err != nil {
			t.Fatal(err)
		}
		if in.Pending == 3 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v", in)
		}
		runtime.Gosched()
	}
	if n, errno := h.ReadRaw(buf[:]); n != 3 || errno != 0 {
		t.Fatal(n, errno)
	}
	if _, err := h.ZeroPage(m.addr(), m.len(), 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range done {
		wait(t, c)
	}
}

func TestWait(t *testing.T) {
	h := open(t, FeaturePagefaultFlagWP)
	stop, err := NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer stop.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	w.Close()
	if err := h.Wait(stop, int(r.Fd())); !errors.Is(err, ErrGone) {
		t.Errorf("hang-up of the target: %v", err)
	}
	done := async(func() error {
		if err := h.Wait(stop); !errors.Is(err, ErrStopped) {
			return errors.Join(errors.New("not stopped"), err)
		}
		return nil
	})
	if err := stop.Signal(); err != nil {
		t.Fatal(err)
	}
	wait(t, done)
	if err := h.Wait(stop); !errors.Is(err, ErrStopped) {
		t.Errorf("a signalled stop must stay so: %v", err)
	}
	if err := h.SetNonblock(false); err != nil {
		t.Fatal(err)
	}
	again, err := NewStop()
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := h.Wait(again); !errors.Is(err, unix.EINVAL) {
		t.Errorf("poll on a blocking descriptor: %v", err)
	}
}

func TestUnmappedUnderneath(t *testing.T) {
	h := open(t, FeaturePagefaultFlagWP)
	m := anonymous(t, 2*page)
	if _, err := h.Register(m.addr(), m.len(), ModeMissing); err != nil {
		t.Fatal(err)
	}
	hole := m.b[page:]
	_, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(unsafe.Pointer(&hole[0])), page, 0)
	if errno != 0 {
		t.Fatal(errno)
	}
	n, err := h.Copy(m.addr(), make([]byte, 2*page), 0)
	if !errors.Is(err, unix.ENOENT) {
		t.Errorf("%d %v", n, err)
	}
}

func TestRawAllocatesNothing(t *testing.T) {
	h := open(t, FeaturePagefaultFlagWP)
	m := anonymous(t, 512*page)
	for i := range 512 {
		m.mustWrite(i*page, []byte{1})
	}
	if _, err := h.Register(m.addr(), m.len(), ModeWP|ModeMissing); err != nil {
		t.Fatal(err)
	}
	var buf [4]Msg
	src := make([]byte, page)
	a := m.addr()
	if n := testing.AllocsPerRun(200, func() {
		h.WriteProtectRaw(a, page)
		h.UnprotectRaw(a, page, true)
		h.CopyRaw(a, unsafe.Pointer(&src[0]), page, 0)
		h.ZeroPageRaw(a, page, 0)
		h.WakeRaw(a, page)
		h.ReadRaw(buf[:])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
