package faultserver

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
)

// trial is a capture by the kernel's engine of memory that only meanwhile touches.
type trial struct {
	kind      source.Kind
	huge      bool
	pages     int
	change    func(*Start)
	before    func(t *testing.T, g *target) // anything is armed
	meanwhile func(t *testing.T, g *target) // after the freeze, before the scan
}

// run returns how the capture ended. One that succeeded is the memory at the freeze.
func (x trial) run(t *testing.T) (st Stats, err error) {
	t.Helper()
	g := newTarget(t, x.kind, x.pages, x.huge)
	if x.before != nil {
		x.before(t, g)
	}
	srv := startServer(t, g, func(o *Start) {
		with(Kernel)(o)
		if x.change != nil {
			x.change(o)
		}
	})
	defer func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := errors.Join(srv.Prearm(t.Context()), srv.Rearm(t.Context())); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, len(g.mem))
	for p := range x.pages {
		if p%8 < 5 || x.huge { // reading an absent page would map it
			copy(want[p*pageBytes:], g.mem[p*pageBytes:][:pageBytes])
		}
	}
	if err := srv.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	x.meanwhile(t, g)
	if err := srv.Scan(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	stop, drained := make(chan struct{}), make(chan uint64)
	go func() { drained <- drain(t, srv, got, stop) }()
	if err := srv.Wait(t.Context()); err != nil {
		close(stop)
		<-drained
		return srv.Stats(), err
	}
	if n := <-drained; n != uint64(x.pages) {
		t.Errorf("%d pages arrived, want %d", n, x.pages)
	}
	for p := range x.pages {
		if !bytes.Equal(got[p*pageBytes:][:pageBytes], want[p*pageBytes:][:pageBytes]) {
			t.Fatalf("page %d differs: %x, was %x", p, got[p*pageBytes:][:16], want[p*pageBytes:][:16])
		}
	}
	return srv.Stats(), nil
}

// drops is how many records to lose, one a capture (CKAGENT_DROPS).
func drops(t *testing.T) int {
	s := os.Getenv("CKAGENT_DROPS")
	if s == "" {
		return 6
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("CKAGENT_DROPS=%q: want a number from 1", s)
	}
	return n
}

// A record that the ring loses is missed, always: whichever it is, and also if the
// programs do not count it.
func TestLostRecordIsMissed(t *testing.T) {
	caught := 0
	for i := range drops(t) {
		const written = 60
		x := trial{pages: 512, change: func(o *Start) {
			o.Config.DropRecord = uint64(1 + i%written)
			o.Config.RingBytes = 1 << 20
		}, meanwhile: func(_ *testing.T, g *target) {
			for p := range written {
				g.write((p*31+i)%512, 9)
			}
		}}
		if _, err := x.run(t); FailureOf(err) != Unproven || !strings.Contains(err.Error(), "dropped 1") {
			t.Errorf("record %d lost: %v", 1+i%written, err)
			continue
		}
		caught++
	}
	t.Logf("%d of %d lost records were missed", caught, drops(t))
}

// writeUnseen stores to pages in a way that raises no fault.
func writeUnseen(t *testing.T, g *target, pages ...uint64) {
	t.Helper()
	for _, p := range pages {
		data := bytes.Repeat([]byte{0xee}, pageBytes)
		local := []unix.Iovec{{Base: &data[0], Len: pageBytes}}
		remote := []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&g.mem[p*pageBytes])), Len: pageBytes}}
		if n, err := unix.ProcessVMWritev(os.Getpid(), local, remote, 0); err != nil || n != pageBytes {
			t.Fatal(n, err)
		}
	}
}

// Pages that somebody writes unseen cost the attempt; the next one is told of them, and
// copies them in the pause.
func TestEscapedPagesAreCopiedInThePause(t *testing.T) {
	for _, kind := range []source.Kind{source.Anonymous, source.Shared} {
		escaped := []uint64{8, 16, 700}
		x := trial{kind: kind, pages: 1024, meanwhile: func(t *testing.T, g *target) { writeUnseen(t, g, escaped...) }}
		_, err := x.run(t)
		var want []Page
		for _, p := range escaped {
			want = append(want, Page{Page: p})
		}
		if got := EscapedOf(err); FailureOf(err) != Unproven || !slices.Equal(got, want) {
			t.Fatalf("%v, escaped %v", err, got)
		}
		x.change = func(o *Start) { o.Config.Escaped = want }
		st, err := x.run(t)
		if err != nil || st.EscapedPages != len(want) {
			t.Errorf("kind %d: %v, %d pages copied in the pause", kind, err, st.EscapedPages)
		}
	}
}

// With a store that hangs the ring fills up. A guest that may be stopped stands still
// for as long as it may; one that may not never waits. Either way the capture is given
// up, and the guest goes on.
func TestFullRingDoesNotHoldTheGuest(t *testing.T) {
	for _, c := range []struct {
		throttle bool
		failure  Failure
	}{{false, Unproven}, {true, Stalled}} {
		g := newTarget(t, source.Anonymous, 8192, false)
		srv := startServer(t, g, func(o *Start) {
			with(Kernel)(o)
			o.Config.MaxStall, o.FaultRingPages, o.ScanRingPages = 80*time.Millisecond, 128, 128
			o.Config.RingBytes, o.Config.Throttle = 1<<20, c.throttle
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
		if err := srv.Wait(t.Context()); FailureOf(err) != c.failure {
			t.Errorf("throttled %v: %v, want %s", c.throttle, err, c.failure)
		}
		t.Logf("throttled %v: longest write %v; %+v", c.throttle, longest, srv.Stats())
		if c.throttle && longest < 60*time.Millisecond || longest > time.Second {
			t.Errorf("throttled %v: longest write took %v, the budget is 80ms", c.throttle, longest)
		}
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	}
}
