package faultserver

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/uffd/pagemap"
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

// hazards are what a host does to memory behind everybody's back.
func TestHazards(t *testing.T) {
	writeSome := func(g *target) {
		for p := 0; p < len(g.mem)/pageBytes; p += 3 {
			g.write(p, 5)
		}
	}
	whole := func(t *testing.T, g *target, advice int) {
		t.Helper()
		if err := unix.Madvise(g.mem, advice); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name      string
		kind      source.Kind
		huge      bool
		prepare   func(t *testing.T)
		before    func(t *testing.T, g *target)
		meanwhile func(t *testing.T, g *target)
		may       bool // be discarded
		must      bool
	}{
		{name: "compaction", meanwhile: func(t *testing.T, g *target) {
			for range 3 {
				if err := os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0); err != nil {
					t.Fatal(err)
				}
				writeSome(g)
			}
		}},
		{name: "compaction of shared memory", kind: source.Shared, meanwhile: func(t *testing.T, g *target) {
			if err := os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
			writeSome(g)
		}},
		{name: "huge pages are split", huge: true, meanwhile: func(_ *testing.T, g *target) { writeSome(g) }},
		{name: "huge pages are given back", huge: true, must: true, meanwhile: func(t *testing.T, g *target) {
			if err := unix.Madvise(g.mem[:hugePages*pageBytes], unix.MADV_DONTNEED); err != nil {
				t.Fatal(err)
			}
			writeSome(g)
		}},
		{name: "pages are given back and taken again", must: true, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_DONTNEED)
			writeSome(g)
		}},
		// Its pages stay in the file, and so do the marks: nothing is lost.
		{name: "mappings of shared memory are dropped", kind: source.Shared, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_DONTNEED)
			writeSome(g)
		}},
		{name: "threads are first at the same pages", meanwhile: firstTogether},
		{name: "threads are first at the same pages of shared memory", kind: source.Shared, meanwhile: firstTogether},
		{name: "the process forks", meanwhile: func(t *testing.T, g *target) {
			forked(t, func() { writeSome(g) })
		}},
		{name: "protection is changed and back", meanwhile: func(t *testing.T, g *target) {
			for _, prot := range []int{unix.PROT_READ, unix.PROT_READ | unix.PROT_WRITE} {
				if err := unix.Mprotect(g.mem, prot); err != nil {
					t.Fatal(err)
				}
			}
			writeSome(g)
		}},
		{name: "pages are swapped out and read", prepare: swapOn, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_PAGEOUT)
			for p := range len(g.mem) / pageBytes {
				if p%8 == 1 {
					_ = bytes.IndexByte(g.mem[p*pageBytes:][:pageBytes], 0xff)
				}
			}
		}},
		{name: "pages are swapped out and written", must: true, prepare: swapOn, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_PAGEOUT)
			writeSome(g)
		}},
		{name: "same pages were merged", before: func(t *testing.T, g *target) {
			alike(t, g)
			merge(t, g)
		}, meanwhile: func(_ *testing.T, g *target) { writeSome(g) }},
		// Merging takes the marks off without a fault, of pages written and not.
		{name: "same pages are merged", must: true, before: alike, meanwhile: func(t *testing.T, g *target) {
			merge(t, g)
			writeSome(g)
		}},
		{name: "pages are marked free", may: true, meanwhile: func(t *testing.T, g *target) {
			whole(t, g, unix.MADV_FREE)
			writeSome(g)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.prepare != nil {
				c.prepare(t)
			}
			_, err := trial{kind: c.kind, huge: c.huge, pages: 2048, before: c.before, meanwhile: c.meanwhile}.run(t)
			switch {
			case err == nil && c.must:
				t.Error("it was not noticed")
			case err != nil && (!c.may && !c.must || FailureOf(err) != Unproven):
				t.Error(err)
			}
			t.Log(err)
		})
	}
}

// firstTogether has two threads write all pages that nobody has touched, in the same order.
func firstTogether(_ *testing.T, g *target) {
	var wg sync.WaitGroup
	for id := range 2 {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for p := range len(g.mem) / pageBytes {
				if p%8 >= 5 {
					g.mem[p*pageBytes+id] = 1
				}
			}
		})
	}
	wg.Wait()
}

// alike makes pages with content the same, and lets the kernel merge them.
func alike(t *testing.T, g *target) {
	t.Helper()
	for p := range len(g.mem) / pageBytes {
		if p%8 < 5 {
			g.write(p, 1)
		}
	}
	if err := unix.Madvise(g.mem, unix.MADV_MERGEABLE); err != nil {
		t.Fatal(err)
	}
}

// merge has the kernel merge same pages until half of those with content are.
func merge(t *testing.T, g *target) {
	t.Helper()
	for name, value := range map[string]string{"pages_to_scan": "4096", "sleep_millisecs": "2", "run": "1"} {
		path := filepath.Join("/sys/kernel/mm/ksm", name)
		before, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, []byte(value), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := os.WriteFile(path, bytes.TrimSpace(before), 0); err != nil {
				t.Error(err)
			}
		}()
	}
	pm, err := pagemap.OpenSelf()
	if err != nil {
		t.Fatal(err)
	}
	defer pm.Close()
	entries := make([]pagemap.Entry, len(g.mem)/pageBytes)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); ; <-tick.C {
		if _, err := pm.Entries(uint64(uintptr(unsafe.Pointer(&g.mem[0]))), entries); err != nil {
			t.Fatal(err)
		}
		pages, frames := 0, map[uint64]bool{}
		for _, e := range entries {
			if e.Present() {
				pages++
				frames[e.PFN()] = true
			}
		}
		if len(frames) <= pages/2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d frames for %d equal pages", len(frames), pages)
		}
	}
}

// forked forks a child that shares all pages, does something in the parent, and ends the
// child.
func forked(t *testing.T, do func()) {
	t.Helper()
	pid, err := bareFork()
	if err != nil {
		t.Fatal(err)
	}
	do()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
		t.Error(err)
	}
}

// bareFork makes a child that shares all pages and sleeps until it is killed.
func bareFork() (pid int, err error) {
	r, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	for r == 0 { // the child: nothing of the runtime works here
		_, _, _ = syscall.RawSyscall(unix.SYS_PAUSE, 0, 0, 0)
	}
	return int(r), nil
}

// swapOn gives the machine swap for the duration of a test.
func swapOn(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "swap")
	if err := os.WriteFile(path, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"/sbin/mkswap", path}, {"/sbin/swapon", path}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("/sbin/swapoff", path).CombinedOutput(); err != nil {
			t.Errorf("swapoff: %v: %s", err, out)
		}
	})
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
