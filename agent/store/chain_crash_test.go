package store

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/image/fsys/crashfs"
)

// recordChain runs a store through what changes a chain: checkpoints that continue each
// other, a merge at its end and one in its middle, members removed.
func recordChain(t *testing.T) *history {
	t.Helper()
	h := &history{rec: crashfs.New()}
	s, err := OpenFS(h.rec, "/var/store")
	if err != nil {
		t.Fatal(err)
	}
	c := newCrashChain(t, h, s)
	first := c.next("none")
	second := c.next("zstd")
	third := c.next("none")
	c.merge(third)
	c.next("none")
	c.remove(first)
	c.remove(third)
	c.merge(second)
	return h
}

func TestPowerLossOfChains(t *testing.T) { testPowerLoss(t, recordChain(t), 4) }

func TestPowerLossOfChainsFindsMistakes(t *testing.T) {
	h := recordChain(t)
	merged := func(o crashfs.Op) bool { return o.Kind == crashfs.Sync && strings.Contains(o.Name, "-m1") }
	findsMistakes(t, h, map[string]func(o crashfs.Op) bool{
		"no sync of tags":            func(o crashfs.Op) bool { return o.Kind == crashfs.Sync && strings.Contains(o.Name, "/tags") },
		"no sync of merged segments": func(o crashfs.Op) bool { return merged(o) && strings.Contains(o.Name, "/seg-m1") },
		"no sync of merged pagemaps": func(o crashfs.Op) bool { return merged(o) && strings.Contains(o.Name, "/pagemap") },
		"no sync of checkpoints":     func(o crashfs.Op) bool { return o.Kind == crashfs.SyncDir && strings.Count(o.Name, "/") == 5 },
	})
}

// crashChain takes checkpoints that continue each other.
type crashChain struct {
	t   *testing.T
	h   *history
	s   *Store
	key *image.TagKey
	ram []byte
}

func newCrashChain(t *testing.T, h *history, s *Store) *crashChain {
	t.Helper()
	key, err := s.TagKey(context.Background(), "vm:chain")
	if err != nil {
		t.Fatal(err)
	}
	return &crashChain{t, h, s, key, []byte(strings.Repeat("page of a chain\n", 6*256))}
}

func (c *crashChain) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *crashChain) next(compress string) string {
	c.t.Helper()
	ctx := context.Background()
	txn, err := c.s.Begin(ctx, "chain")
	c.must(err)
	c.h.note("begin", txn.ID())
	parent, err := c.s.OpenParent(ctx, "chain", "", c.key)
	c.must(err)
	o := image.WriterOptions{FS: txn.FS(), Compress: compress, Lanes: 1, Key: c.key, VM: "chain"}
	m := &image.Manifest{}
	if parent != nil {
		o.Parent, m.Parent, m.Depth = parent.Reader, parent.Manifest().ID, parent.Manifest().Depth+1
	}
	blocks := []image.Block{{Name: "pc.ram", UsedBytes: uint64(len(c.ram)), TotalBytes: uint64(len(c.ram)), PageBytes: 4096, Backing: "anonymous"}}
	w, err := image.NewWriter(txn.Dir(), blocks, o)
	c.must(err)
	defer w.Abort()
	if parent != nil {
		c.must(parent.Close())
	}
	// Half of what the parent stored is replaced, so that each member has segments of
	// several others.
	for p := range len(c.ram) / 4096 {
		if parent == nil || (p+len(c.h.events))%2 == 0 {
			copy(c.ram[p*4096:], strings.Repeat(fmt.Sprintf("%s %06d\n", txn.ID()[19:], p), 256))
		}
	}
	c.must(w.WritePages(0, 0, c.ram))
	c.must(w.WriteDeviceState(strings.NewReader("device state of " + txn.ID())))
	sum, err := w.Finish(ctx)
	c.must(err)
	sum.Apply(m)
	c.must(txn.Commit(ctx, m))
	c.h.note("commit", txn.ID())
	return txn.ID()
}

// merge promises that the checkpoint is there all the time.
func (c *crashChain) merge(id string) {
	c.t.Helper()
	info, err := c.s.Merge(context.Background(), id, MergeOptions{})
	c.must(err)
	if info.Inherited != 0 {
		c.t.Fatalf("%+v", info)
	}
}

func (c *crashChain) remove(id string) {
	c.t.Helper()
	c.h.note("remove", id)
	_, err := c.s.Remove(context.Background(), id, false)
	c.must(err)
	c.h.note("removed", id)
}
