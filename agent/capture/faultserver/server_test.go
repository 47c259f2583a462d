package faultserver

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/passfd"
	"github.com/ckagent/ckagent/uffd"
)

func TestCaptureIsTheMemoryAtTheFreeze(t *testing.T) {
	for _, c := range []struct {
		name   string
		kind   source.Kind
		huge   bool
		engine Engine
	}{
		{"anonymous", source.Anonymous, false, Synchronous},
		{"huge pages", source.Anonymous, true, Synchronous},
		{"memfd shared", source.Shared, false, Synchronous},
		{"file private", source.PrivateFile, false, Synchronous},
		{"anonymous in the kernel", source.Anonymous, false, Kernel},
		{"huge pages in the kernel", source.Anonymous, true, Kernel},
		{"memfd shared in the kernel", source.Shared, false, Kernel},
	} {
		t.Run(c.name, func(t *testing.T) {
			const pages = 32*hugePages + 77
			discarded := 0
			for round := 0; round < 3; round++ {
				g := newTarget(t, c.kind, pages, c.huge)
				g.start(2)
				srv := startServer(t, g, with(c.engine))
				if err := errors.Join(srv.Prearm(t.Context()), srv.Rearm(t.Context())); err != nil {
					t.Fatal(err)
				}
				g.gate.Lock()
				want := bytes.Clone(g.mem)
				if err := srv.Freeze(t.Context()); err != nil {
					t.Fatal(err)
				}
				g.gate.Unlock()
				if err := srv.Scan(); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(want))
				n, err := drainAll(t, srv, got)
				g.end()
				if f := FailureOf(err); c.engine == Kernel && (f == Unproven || f == Stalled) && discarded < 5 {
					// Writers that nothing holds back fill the ring of a host that has
					// no processor for its reader: given up, and not wrong.
					t.Logf("round %d is taken again: %v", round, err)
					discarded++
					round--
					if err := srv.Close(); err != nil {
						t.Error(err)
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				if n != pages {
					t.Errorf("%d pages arrived, want %d", n, pages)
				}
				for p := range pages {
					if !bytes.Equal(got[p*pageBytes:][:pageBytes], want[p*pageBytes:][:pageBytes]) {
						t.Fatalf("page %d differs: %x, was %x", p, got[p*pageBytes:][:16], want[p*pageBytes:][:16])
					}
				}
				st := srv.Stats()
				if st.Faults == 0 || st.FaultPages+st.ScanPages != pages {
					t.Errorf("faults %d, pages %d by fault and %d by scan", st.Faults, st.FaultPages, st.ScanPages)
				}
				if round == 0 {
					t.Logf("%+v", st)
				}
				if err := srv.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// A page discarded behind our back has lost its content; the capture says so
// instead of delivering zeros.
func TestDiscardedPageIsNoticed(t *testing.T) {
	for _, c := range []struct {
		kind   source.Kind
		engine Engine
	}{
		{source.Anonymous, Synchronous}, {source.Shared, Synchronous}, {source.PrivateFile, Synchronous},
		{source.Anonymous, Kernel}, {source.Shared, Kernel},
	} {
		kind := c.kind
		g := newTarget(t, kind, 4096, false)
		srv := startServer(t, g, with(c.engine))
		if err := srv.Prearm(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := srv.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		advice := unix.MADV_DONTNEED
		if kind == source.Shared {
			advice = unix.MADV_REMOVE
		}
		if err := unix.Madvise(g.mem[4000*pageBytes:][:pageBytes], advice); err != nil {
			t.Fatal(err)
		}
		if err := srv.Scan(); err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		drained := make(chan struct{})
		go func() { defer close(drained); drain(t, srv, make([]byte, len(g.mem)), stop) }()
		if err := srv.Wait(t.Context()); FailureOf(err) != Unproven {
			t.Errorf("kind %d, engine %s: %v, want %s", kind, c.engine, err, Unproven)
		}
		close(stop)
		<-drained
		g.write(0, 1) // nothing is armed any more
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	}
}

// With a consumer that hangs, the guest waits for the stall budget and not
// longer; the capture is given up.
func TestHangingStoreDoesNotHoldTheGuest(t *testing.T) {
	g := newTarget(t, source.Anonymous, 8192, false)
	srv := startServer(t, g, func(o *Start) {
		o.Config.MaxStall, o.FaultRingPages, o.ScanRingPages = 80*time.Millisecond, 128, 128
	})
	if err := errors.Join(srv.Prearm(t.Context()), srv.Freeze(t.Context()), srv.Scan()); err != nil {
		t.Fatal(err)
	}
	var longest time.Duration
	for p := range 8192 {
		begin := time.Now()
		g.write(p, 7)
		longest = max(longest, time.Since(begin))
	}
	if err := srv.Wait(t.Context()); FailureOf(err) != Stalled {
		t.Errorf("%v, want %s", err, Stalled)
	}
	t.Logf("longest write %v", longest)
	if longest < 80*time.Millisecond || longest > time.Second {
		t.Errorf("longest write took %v, the budget is 80ms", longest)
	}
	if err := srv.Close(); err != nil {
		t.Error(err)
	}
}

// Killed at any time, the server takes its protection with it.
func TestKilledServerFreesTheGuest(t *testing.T) {
	for i, step := range []string{"prearmed", "frozen", "scanning", "prearmed", "frozen", "scanning"} {
		engine := []Engine{Synchronous, Kernel}[i/3]
		g := newTarget(t, source.Anonymous, 8192, false)
		srv := startServer(t, g, with(engine))
		if err := srv.Prearm(t.Context()); err != nil {
			t.Fatal(err)
		}
		g.uffd.Close() // the server's is the only one now
		if step != "prearmed" {
			if err := srv.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if step == "scanning" {
			if err := srv.Scan(); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Kill(srv.PID(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for p := range 8192 {
			g.write(p, 7)
		}
		if err := srv.Wait(t.Context()); FailureOf(err) != Broken {
			t.Errorf("%s, %s: %v, want %s", engine, step, err, Broken)
		}
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestAbortAndCancelLetGo(t *testing.T) {
	g := newTarget(t, source.Anonymous, 8192, false)
	srv := startServer(t, g, nil)
	if err := errors.Join(srv.Prearm(t.Context()), srv.Freeze(t.Context()), srv.Scan()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if err := srv.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) { // nobody drains
		t.Fatal(err)
	}
	if err := srv.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	for p := range 8192 {
		g.write(p, 7)
	}
	if err := srv.Close(); err != nil {
		t.Error(err)
	}
}

// A server that lives but does not answer must not hold the guest in its pause.
func TestFreezeIsNotWaitedForForEver(t *testing.T) {
	conn, peer, err := passfd.Pair("fault server")
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	defer conn.Close()
	c := &Client{proc: &Process{conn: conn}, buf: make([]byte, maxDatagram), freezeWithin: 10 * time.Millisecond}
	if err := c.Freeze(t.Context()); FailureOf(err) != Silent {
		t.Errorf("%v, want %s", err, Silent)
	}
}

func TestHistogramQuantiles(t *testing.T) {
	var h histogram
	for ns := range 10_000 {
		h.add(time.Duration(ns + 1))
	}
	for _, c := range []struct {
		q    float64
		want int64
	}{{0.5, 5000}, {0.99, 9900}} {
		if got := h.quantile(c.q); got > c.want || float64(got) < 0.75*float64(c.want) {
			t.Errorf("quantile %v = %d, want up to a quarter below %d", c.q, got, c.want)
		}
	}
	if h.max != 10_000 {
		t.Errorf("max %d", h.max)
	}
}

// A fault thread that wakes the guest for a page that was done finds nothing
// registered any more, if everything was let go of in between: no failure.
func TestWakingAfterReleaseIsNoFailure(t *testing.T) {
	f, err := uffd.New(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err != nil {
		t.Skipf("no userfaultfd to be had: %v", err)
	}
	h, err := uffd.Adopt(f, syncFeatures)
	if err != nil {
		t.Skipf("this kernel cannot: %v", err)
	}
	defer h.Close()
	g := newTarget(t, source.Anonymous, 64, false)
	s := &server{h: h, failed: make(chan struct{})}
	tab := newPageTable(source.Block{HVA: uint64(uintptr(unsafe.Pointer(&g.mem[0]))), Pages: 64})
	s.phase.Store(uint32(released))
	if s.unprotect(0, tab, 3, 1) || s.failedWith() != nil {
		t.Errorf("after the release: %v", s.failedWith())
	}
	s.phase.Store(uint32(capturing))
	if s.unprotect(0, tab, 3, 1) || FailureOf(s.failedWith()) != Broken {
		t.Errorf("while capturing: %v, want %s", s.failedWith(), Broken)
	}
}
