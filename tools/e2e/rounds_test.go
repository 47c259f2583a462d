package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/tools/vmtest"
)

const (
	defaultRounds = 6
	pageBytes     = 4096
	// wantByFault is the share of the pages the guest wrote during the captures
	// whose old content must have been saved by a fault: below it the test would
	// say little about faults. The list of them has a limit, which pages saved one by
	// one reach.
	wantByFault = 0.15
)

// rounds is how many consecutive checkpoints to take (CKAGENT_E2E_ROUNDS).
func rounds(t testing.TB) int {
	t.Helper()
	s := os.Getenv("CKAGENT_E2E_ROUNDS")
	if s == "" {
		return defaultRounds
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("CKAGENT_E2E_ROUNDS=%q: want a number from 1", s)
	}
	return n
}

// witness copies a machine's memory twice for each checkpoint, behind ckagent's
// back: at the stopped instant, while the proxy withholds the command that would
// end it (the device state is saved by then, and nothing runs), and when the
// capture is over, while the machine is stopped once more through a monitor of
// the test's own.
type witness struct {
	pid     int
	blocks  []block
	control *vmtest.Monitor

	at, after [][]byte // by block
	contSeen  atomic.Bool

	mu   sync.Mutex
	errs []error
	ends int
}

func newWitness(t testing.TB, v *vmtest.VM, control *vmtest.Monitor, blocks []block) *witness {
	t.Helper()
	w := &witness{pid: v.PID(), blocks: blocks, control: control}
	for _, b := range blocks {
		w.at = append(w.at, make([]byte, b.UsedBytes))
		w.after = append(w.after, make([]byte, b.UsedBytes))
	}
	return w
}

func (w *witness) note(err error) {
	if err == nil {
		return
	}
	w.mu.Lock()
	w.errs = append(w.errs, err)
	w.mu.Unlock()
}

func (w *witness) copy(into [][]byte) error {
	for i, b := range w.blocks {
		if err := vmtest.ReadRAMInto(w.pid, b.HVA, into[i]); err != nil {
			return err
		}
	}
	return nil
}

func (w *witness) stopped(ctx context.Context) error {
	var s struct{ Running bool }
	if err := w.control.Execute(ctx, "query-status", nil, &s); err != nil {
		return err
	}
	if s.Running {
		return errors.New("the machine runs at the instant it is said to be stopped")
	}
	return nil
}

// watch puts the witness into the proxy. A pause under it takes as long as its copy of all
// memory does: it is no figure of ours.
func (w *witness) watch(p *vmtest.Proxy) (remove func()) {
	stop := p.Withhold("cont", func(ctx context.Context, _ vmtest.Message) {
		w.note(errors.Join(w.stopped(ctx), w.copy(w.at), w.stopped(ctx)))
		w.contSeen.Store(true)
	})
	// The descriptor set for the device state is given back right after nothing is
	// armed any more: the first sign of it on the wire.
	end := p.Withhold("remove-fd", func(ctx context.Context, _ vmtest.Message) {
		if !w.contSeen.Swap(false) {
			return
		}
		err := w.control.Execute(ctx, "stop", nil, nil)
		if err == nil {
			err = errors.Join(w.copy(w.after), w.control.Execute(ctx, "cont", nil, nil))
		}
		w.note(err)
		w.mu.Lock()
		w.ends++
		w.mu.Unlock()
	})
	return func() { stop(); end() }
}

// share counts the pages that the guest wrote between the two copies, and those
// of them that were saved by a fault. The former include what was written after
// the last page was captured, so the share is rather too small than too large.
func (w *witness) share(m *image.Manifest) (written, byFault uint64) {
	faulted := make([]map[uint64]bool, len(w.blocks))
	for i := range faulted {
		faulted[i] = map[uint64]bool{}
	}
	for _, r := range m.Hot {
		for p := r.First; p < r.First+r.Pages; p++ {
			faulted[r.Block][p] = true
		}
	}
	for i := range w.blocks {
		a, b := w.at[i], w.after[i]
		for off := 0; off < len(a); off += pageBytes {
			if !bytes.Equal(a[off:off+pageBytes], b[off:off+pageBytes]) {
				written++
				if faulted[i][uint64(off/pageBytes)] {
					byFault++
				}
			}
		}
	}
	return written, byFault
}

// compare checks every byte of an image against the copy of the stopped instant.
func (w *witness) compare(dir string) (m *image.Manifest, err error) {
	r, err := image.OpenReader(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	m = r.Manifest()
	if len(m.Blocks) != len(w.blocks) {
		return m, fmt.Errorf("%d blocks in the image, %d in the machine", len(m.Blocks), len(w.blocks))
	}
	buf := make([]byte, 4<<20)
	for i, b := range w.blocks {
		if m.Blocks[i].Name != b.Name || m.Blocks[i].UsedBytes != b.UsedBytes {
			return m, fmt.Errorf("block %+v in the image, %+v in the machine", m.Blocks[i], b)
		}
		for at := uint64(0); at < b.UsedBytes; at += uint64(len(buf)) {
			got := buf[:min(uint64(len(buf)), b.UsedBytes-at)]
			if _, err := r.ReadRun(i, at/pageBytes, got); err != nil {
				return m, err
			}
			want := w.at[i][at : at+uint64(len(got))]
			if bytes.Equal(got, want) {
				continue
			}
			for off := 0; off < len(got); off += pageBytes {
				if !bytes.Equal(got[off:off+pageBytes], want[off:off+pageBytes]) {
					return m, fmt.Errorf("block %s, page %d differs from the memory at the stopped instant", b.Name, (at+uint64(off))/pageBytes)
				}
			}
		}
	}
	return m, nil
}

// ramblocks is what QEMU itself says its blocks are: name and used bytes.
var ramblockLine = regexp.MustCompile(`(?m)^\s*(\S+)\s+\d+ [KMG]iB\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x[0-9a-f]+`)

func ramblocks(t testing.TB, m *vmtest.Monitor) map[string]uint64 {
	t.Helper()
	text, err := m.HMP(t.Context(), "info ramblock")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]uint64{}
	for _, l := range ramblockLine.FindAllStringSubmatch(text, -1) {
		n, err := strconv.ParseUint(l[2], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		out[l[1]] = n
	}
	return out
}

// TestConsecutiveCheckpoints takes checkpoint after checkpoint of a guest that
// dirties 20,000 pages a second, compares each with an independent copy of the
// memory at the stopped instant, and restores every one.
func TestConsecutiveCheckpoints(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "takes and restores many checkpoints")
	}
	x := newTool(t)
	v, ids := consecutive(t, x, vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 20000, SweepMS: 2000}, course{engine: "uffd", n: rounds(t), keep: 0})
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		r, m := x.restore(t, id, v.SerialPath())
		x.wantDrained(t, r, m, true)
		m.Kill()
		removeLater(r)
	}
	x.wantOnly(t, ids...)
}

// course is how consecutive checkpoints are taken.
type course struct {
	engine string
	n      int
	keep   int // newest of them; 0: all
	// disturb does something to the machine or the host until what it returns is called.
	// Of the checkpoints some may then be taken again, by whatever engine.
	disturb func(t *testing.T, v *vmtest.VM) (end func())
}

// wantByEngine is the share of a disturbed course that the engine must manage.
const wantByEngine = 0.95

// consecutive takes n checkpoints and compares each with the memory at its instant.
func consecutive(t *testing.T, x *tool, cfg vmtest.Config, o course) (v *vmtest.VM, ids []string) {
	t.Helper()
	n := o.n
	bed := newBedOf(t, cfg)
	v = bed.v
	var e explained
	x.json(t, &e, "explain", itoa(v.PID()))
	truth := ramblocks(t, bed.control)
	if len(truth) != len(e.Blocks) {
		t.Fatalf("QEMU has %v, explain says %+v", truth, e.Blocks)
	}
	for _, b := range e.Blocks {
		if truth[b.Name] != b.UsedBytes {
			t.Errorf("block %s: %d bytes, QEMU says %d", b.Name, b.UsedBytes, truth[b.Name])
		}
	}
	w := newWitness(t, v, bed.control, e.Blocks)
	defer w.watch(bed.proxy)()

	before := v.WaitProgress(t, 20000)
	if o.disturb != nil {
		defer o.disturb(t, v)()
	}
	again := map[string]int{} // why checkpoints were taken again
	var written, byFault, faults uint64
	lowest := 1.0
	for i := range n {
		v.WaitProgress(t, 5000)
		c := x.checkpoint(t, v.PID(), "--qmp", "unix:"+bed.proxy.Path(), "--mode", "cow", "--engine", o.engine, "--keep-last", itoa(o.keep))
		if o.disturb == nil && (c.Mode != "cow" || c.Engine != o.engine || len(c.Retaken) > 0) {
			t.Errorf("round %d: mode %s, engine %s, retaken %q", i, c.Mode, c.Engine, c.Retaken)
		}
		if c.Engine != o.engine {
			again[c.Retaken[len(c.Retaken)-1]]++
		}
		wantUntouched(t, v.PID())
		w.mu.Lock()
		err := errors.Join(w.errs...)
		ends := w.ends
		w.mu.Unlock()
		if err != nil || ends < i+1 {
			t.Fatalf("round %d: the witness (%d looks): %v", i, ends, err)
		}
		m, err := w.compare(x.dir(t, c.ID))
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		a, b := w.share(m)
		written, byFault, faults = written+a, byFault+b, faults+c.Faults
		share := float64(b) / float64(max(a, 1))
		lowest = min(lowest, share)
		ids = append(ids, c.ID)
		t.Logf("round %2d: %6d pages written during the capture, %6d of them saved by fault (%.0f %%), %d faults (p50 %v), capture %v, total %v",
			i, a, b, share*100, c.Faults, time.Duration(c.FaultP50NS), time.Duration(c.ScanNS).Round(time.Millisecond), time.Duration(c.TotalNS).Round(time.Millisecond))
	}
	after := v.WaitProgress(t, 5000)
	v.Invariants()
	rate := float64(after.Writes-before.Writes) / (float64(after.MonoUS-before.MonoUS) / 1e6)
	share := float64(byFault) / float64(max(written, 1))
	for why, n := range again {
		t.Logf("%d checkpoints were not finished by engine %s: %s", n, o.engine, why)
	}
	missed := 0
	for _, k := range again {
		missed += k
	}
	if done := float64(n-missed) / float64(n); done < wantByEngine {
		t.Errorf("%d of %d checkpoints were finished by engine %s, want %.0f %%", n-missed, n, o.engine, wantByEngine*100)
	}
	t.Logf("%d checkpoints equal to the memory at their instant; the guest wrote %.0f pages/s (%d late); %d pages written during captures, %.1f %% saved by fault (lowest %.1f %%), %d faults",
		n, rate, after.Late, written, share*100, lowest*100, faults)
	if o.disturb == nil && share < wantByFault {
		t.Errorf("%.1f %% of the pages written during captures were saved by fault, want %.0f %%", share*100, wantByFault*100)
	}
	return v, ids
}
