package faultserver

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// newWholeTarget is memory of hugetlbfs, in which every fourth page is absent.
func newWholeTarget(t *testing.T, kind source.Kind, wholes int) *target {
	t.Helper()
	if missing := vmtest.HugePages(t, 2048, wholes); missing != "" {
		vmtest.Skip(t, "hugetlb", "%s", missing)
	}
	fd, err := unix.MemfdCreate("target", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "target")
	defer f.Close()
	size := wholes * hugePages * pageBytes
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	flags := unix.MAP_SHARED
	if kind == source.PrivateFile {
		flags = unix.MAP_PRIVATE
	}
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	})
	g := &target{mem: mem, kind: kind}
	for p := range wholes * hugePages {
		if p/hugePages%4 != 3 {
			g.write(p, uint64(p))
		}
	}
	return g
}

// whole tells a server what the memory is.
func whole(o *Start) {
	o.Config.Blocks[0].Whole = true
	o.FaultRingPages, o.ScanRingPages = 4*hugePages, 2*hugePages
}

// TestHugetlbIsTheMemoryAtTheFreeze: pages of hugetlbfs are protected, copied and let go
// as wholes, whatever of them is written.
func TestHugetlbIsTheMemoryAtTheFreeze(t *testing.T) {
	const wholes = 24
	for _, kind := range []source.Kind{source.Shared, source.PrivateFile} {
		for round := range 3 {
			g := newWholeTarget(t, kind, wholes)
			g.start(2)
			srv := startServer(t, g, whole)
			if err := srv.Prearm(t.Context()); err != nil {
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
			if err != nil {
				t.Fatal(err)
			}
			g.end()
			if n != wholes*hugePages || !bytes.Equal(got, want) {
				t.Errorf("kind %d: %d pages arrived, want %d; the memory is right: %v", kind, n, wholes*hugePages, bytes.Equal(got, want))
			}
			st := srv.Stats()
			if st.Faults == 0 || st.FaultPages%hugePages != 0 || st.FaultPages+st.ScanPages != wholes*hugePages {
				t.Errorf("faults %d, pages %d by fault and %d by scan", st.Faults, st.FaultPages, st.ScanPages)
			}
			if round == 0 {
				t.Logf("%+v", st)
			}
			if err := srv.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestDiscardedHugetlbIsNoticed: the kernel keeps the mark of a page of hugetlbfs that is
// discarded, so that its absence has to tell.
func TestDiscardedHugetlbIsNoticed(t *testing.T) {
	for _, kind := range []source.Kind{source.Shared, source.PrivateFile} {
		g := newWholeTarget(t, kind, 8)
		srv := startServer(t, g, whole)
		if err := errors.Join(srv.Prearm(t.Context()), srv.Freeze(t.Context())); err != nil {
			t.Fatal(err)
		}
		advice := unix.MADV_DONTNEED
		if kind == source.Shared {
			advice = unix.MADV_REMOVE
		}
		if err := unix.Madvise(g.mem[5*hugePages*pageBytes:][:hugePages*pageBytes], advice); err != nil {
			t.Fatal(err)
		}
		if err := srv.Scan(); err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		drained := make(chan struct{})
		go func() { defer close(drained); drain(t, srv, make([]byte, len(g.mem)), stop) }()
		if err := srv.Wait(t.Context()); FailureOf(err) != Unproven {
			t.Errorf("kind %d: %v, want %s", kind, err, Unproven)
		}
		close(stop)
		<-drained
		g.write(0, 1) // nothing is armed any more
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	}
}
