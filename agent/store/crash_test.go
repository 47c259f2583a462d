package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys/crashfs"
	"github.com/ckagent/ckagent/agent/image/fsys/memfs"
)

// history is what a recorded run promised, in terms of the number of operations
// recorded so far.
type history struct {
	rec    *crashfs.Recorder
	events []event
}

type event struct {
	at   int
	what string // begin, commit, remove, removed, pin, pinned
	id   string
}

func (h *history) note(what, id string) {
	h.events = append(h.events, event{len(h.rec.Ops()), what, id})
}

// fill writes a tiny checkpoint: two pages of data, one of zeros.
func fill(t *testing.T, txn *Txn, compress string) *image.Manifest {
	t.Helper()
	blocks := []image.Block{{Name: "pc.ram", UsedBytes: 3 * 4096, TotalBytes: 3 * 4096, PageBytes: 4096, Backing: "anonymous"}}
	w, err := image.NewWriter(txn.Dir(), blocks, image.WriterOptions{FS: txn.FS(), Compress: compress, Lanes: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	for p := range uint64(2) {
		if err := w.WritePages(0, p, []byte(strings.Repeat(fmt.Sprintf("%s %06d\n", txn.ID()[19:], p), 256))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.WriteZero(0, 2, 1); err != nil {
		t.Fatal(err)
	}
	if err := w.WriteDeviceState(strings.NewReader("device state of " + txn.ID())); err != nil {
		t.Fatal(err)
	}
	s, err := w.Finish(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	m := &image.Manifest{}
	s.Apply(m)
	return m
}

// fillDisk writes the volume of a disk, on top of the chain it continues.
func fillDisk(t *testing.T, txn *Txn, m *image.Manifest, chain []image.Volume) []image.Volume {
	t.Helper()
	dir, err := txn.VolumeDir(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	data := []byte(strings.Repeat("volume of "+txn.ID()+"\n", 100))
	v := image.Volume{Name: image.VolumeName(txn.ID(), 0), Bytes: uint64(len(data)), Checksum: image.Sum(data)}
	// Not synced here, as by a copy that somebody else wrote: Commit has to.
	f, err := txn.FS().Create(filepath.Join(dir, v.Name))
	if err == nil {
		err = errors.Join(f.WriteVec([][]byte{data}, 0), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	chain = append([]image.Volume{v}, chain...)
	m.Disks = []image.Disk{{Name: "vda", Format: "qcow2", Path: "/img", SizeBytes: 1 << 20, Method: image.DiskBackup, Content: image.ContentGuest, Volumes: chain}}
	m.Stats.DiskBytes = v.Bytes
	return chain
}

// record runs a store through everything that changes it.
func record(t *testing.T) *history {
	t.Helper()
	ctx := context.Background()
	h := &history{rec: crashfs.New()}
	s, err := OpenFS(h.rec, "/var/store")
	if err != nil {
		t.Fatal(err)
	}
	chains := map[string][]image.Volume{}
	commit := func(vm, compress string) string {
		txn, err := s.Begin(ctx, vm)
		if err != nil {
			t.Fatal(err)
		}
		m := fill(t, txn, compress)
		chains[vm] = fillDisk(t, txn, m, chains[vm])
		h.note("begin", txn.ID())
		if err := txn.Commit(ctx, m); err != nil {
			t.Fatal(err)
		}
		h.note("commit", txn.ID())
		return txn.ID()
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	a := commit("a", "none")
	b := commit("a", "s2")
	h.note("pin", a)
	must(s.Pin(ctx, a))
	h.note("pinned", a)
	txn, err := s.Begin(ctx, "a")
	must(err)
	fillDisk(t, txn, fill(t, txn, "none"), chains["a"])
	must(txn.Abort())
	c := commit("b", "zstd")
	d := commit("a", "none")
	h.note("remove", b)
	_, err = s.Remove(ctx, b, false)
	must(err)
	h.note("removed", b)
	e := commit("a", "none")
	h.note("remove", d)
	rep, err := s.ApplyRetention(ctx, "a", 1)
	must(err)
	if len(rep.Removed) != 1 || rep.Removed[0] != d {
		t.Fatalf("%+v", rep)
	}
	h.note("removed", d)
	h.note("remove", c)
	_, err = s.Remove(ctx, c, true)
	must(err)
	h.note("removed", c)
	_, err = s.GC(ctx, GCOptions{})
	must(err)
	_ = e
	return h
}

// promised says, for a loss after n operations, which checkpoints must be there
// and which may be; the others must not.
func (h *history) promised(n int) (must, may, pinned map[string]bool) {
	must, may, pinned = map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, e := range h.events {
		if e.at > n {
			break
		}
		switch e.what {
		case "begin":
			may[e.id] = true
		case "commit":
			must[e.id] = true
		case "remove":
			delete(must, e.id)
		case "removed":
			delete(may, e.id)
		case "pinned":
			pinned[e.id] = true
		}
	}
	// An event at n may have happened with no operation after it; what starts there
	// has done nothing yet, so both readings of it agree.
	return must, may, pinned
}

// check looks at the store after a loss, as the host that booted again.
func (h *history) check(n int, f *memfs.FS) error {
	ctx := context.Background()
	s, err := OpenFS(f, "/var/store")
	if err != nil {
		return err
	}
	s.id.bootID = "after" // everybody from before is dead
	must, may, pinned := h.promised(n)
	look := func() (map[string]bool, error) {
		seen := map[string]bool{}
		list, err := s.List(ctx)
		if err != nil && len(must) > 0 {
			return nil, err
		}
		for _, i := range list {
			if !may[i.ID] && !must[i.ID] {
				return nil, fmt.Errorf("%s is visible", i.ID)
			}
			if _, err := s.Verify(ctx, i.ID, nil); err != nil {
				return nil, fmt.Errorf("%s is visible and damaged: %w", i.ID, err)
			}
			if pinned[i.ID] && !i.Pinned {
				return nil, fmt.Errorf("%s lost its pin", i.ID)
			}
			seen[i.ID] = true
		}
		for id := range must {
			if !seen[id] {
				return nil, fmt.Errorf("%s was committed and is gone", id)
			}
		}
		return seen, nil
	}
	before, err := look()
	if err != nil {
		return err
	}
	// GC cleans up, harms nothing, and leaves nothing for the next one.
	if len(before) > 0 {
		if _, err := s.GC(ctx, GCOptions{}); err != nil {
			return err
		}
		after, err := look()
		if err != nil {
			return fmt.Errorf("after gc: %w", err)
		}
		if len(after) != len(before) {
			return fmt.Errorf("gc changed what is visible: %v, before %v", after, before)
		}
		if rep, err := s.GC(ctx, GCOptions{}); err != nil || len(rep.Removed) > 0 {
			return fmt.Errorf("gc left %v, %v", rep.Removed, err)
		}
	}
	return nil
}

// replay checks every prefix of a record, or every step-th, in several ways of losing,
// until it has seen enough failures.
func (h *history) replay(ops []crashfs.Op, step, variants, enough int) (states int, failures []string) {
	for n := 0; n <= len(ops) && len(failures) < enough; n += step {
		for v := range variants + 2 {
			loss := crashfs.LoseSome
			if v < 2 {
				loss = crashfs.Loss(v)
			}
			states++
			f := crashfs.State(ops[:n], loss, rand.New(rand.NewSource(int64(n*1000+v))))
			if err := h.check(n, f); err != nil {
				last := "nothing"
				if n > 0 {
					last = ops[n-1].String()
				}
				failures = append(failures, fmt.Sprintf("power lost after %d operations (last: %s), way %d: %v", n, last, v, err))
			}
		}
	}
	return states, failures
}

func TestPowerLoss(t *testing.T) { testPowerLoss(t, record(t), 8) }

// testPowerLoss looks at the states after a loss at every point: all lost, nothing lost,
// and so many random variants.
func testPowerLoss(t *testing.T, h *history, variants int) {
	t.Helper()
	step := 1
	if testing.Short() { // the race detector needs the code, not each state
		step, variants = 5, 1
	}
	states, failures := h.replay(h.rec.Ops(), step, variants, 10)
	for _, f := range failures[:min(len(failures), 10)] {
		t.Error(f)
	}
	t.Logf("%d operations, %d states, %d failures", len(h.rec.Ops()), states, len(failures))
}

// TestPowerLossFindsMistakes takes the syncs away one kind at a time: a model
// that does not notice proves nothing.
func TestPowerLossFindsMistakes(t *testing.T) {
	findsMistakes(t, record(t), map[string]func(o crashfs.Op) bool{
		"no sync of segments":      func(o crashfs.Op) bool { return o.Kind == crashfs.Sync && strings.Contains(o.Name, "/seg-") },
		"no sync of the pagemap":   func(o crashfs.Op) bool { return o.Kind == crashfs.Sync && strings.HasSuffix(o.Name, "/pagemap") },
		"no sync of the state":     func(o crashfs.Op) bool { return o.Kind == crashfs.Sync && strings.HasSuffix(o.Name, "/device-state") },
		"no sync of the manifest":  func(o crashfs.Op) bool { return o.Kind == crashfs.Sync && strings.Contains(o.Name, "manifest.json") },
		"no sync of volumes":       func(o crashfs.Op) bool { return o.Kind == crashfs.Sync && strings.Contains(o.Name, "/disks/") },
		"no sync of their names":   func(o crashfs.Op) bool { return o.Kind == crashfs.SyncDir && strings.HasSuffix(o.Name, "/disks") },
		"no sync of checkpoints":   func(o crashfs.Op) bool { return o.Kind == crashfs.SyncDir && strings.Count(o.Name, "/") == 5 },
		"no sync of VMs":           func(o crashfs.Op) bool { return o.Kind == crashfs.SyncDir && strings.Count(o.Name, "/") == 4 },
		"no sync of vms":           func(o crashfs.Op) bool { return o.Kind == crashfs.SyncDir && strings.HasSuffix(o.Name, "/vms") },
		"no sync of the store":     func(o crashfs.Op) bool { return o.Kind == crashfs.SyncDir && o.Name == "/var/store" },
		"no sync of the directory": func(o crashfs.Op) bool { return o.Kind == crashfs.SyncDir && o.Name == "/var" },
	})
}

func findsMistakes(t *testing.T, h *history, mistakes map[string]func(o crashfs.Op) bool) {
	t.Helper()
	if testing.Short() {
		t.Skip("short run: a mistake shows in few of all states")
	}
	for name, useless := range mistakes {
		// The operation stays in the record, without effect, so that the events keep
		// their places.
		ops := append([]crashfs.Op(nil), h.rec.Ops()...)
		n := 0
		for i, o := range ops {
			if useless(o) {
				ops[i] = crashfs.Op{Kind: crashfs.Write, Name: "/nowhere"}
				n++
			}
		}
		if n == 0 {
			t.Errorf("%s: no such operation", name)
			continue
		}
		ops = append([]crashfs.Op{{Kind: crashfs.Create, Name: "/nowhere"}}, ops...)
		shifted := &history{rec: h.rec}
		for _, e := range h.events {
			e.at++
			shifted.events = append(shifted.events, e)
		}
		if _, failures := shifted.replay(ops, 1, 2, 1); len(failures) == 0 {
			t.Errorf("%s: not noticed", name)
		}
	}
}

func TestRecordedOrder(t *testing.T) {
	h := record(t)
	var lines []string
	for _, o := range h.rec.Ops() {
		lines = append(lines, o.String())
	}
	// In every commit: all names durable, then the rename, then that durable.
	for i, o := range h.rec.Ops() {
		if o.Kind != crashfs.Rename || !strings.HasSuffix(o.To, "/manifest.json") {
			continue
		}
		if want := "syncdir " + o.Name[:strings.LastIndex(o.Name, "/")]; lines[i-1] != want || lines[i+1] != want {
			t.Errorf("around the rename: %s; %s", lines[i-1], lines[i+1])
		}
	}
	sort.Strings(lines)
	if len(lines) == 0 {
		t.Error("nothing was recorded")
	}
}
