package storetest

import (
	"bytes"
	"context"
	"math/rand"
	"testing"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/store"
)

// Chain is a VM whose checkpoints continue each other, and what each of them holds.
type Chain struct {
	VM   string
	Rand *rand.Rand
	RAM  []byte            // now
	Want map[string][]byte // by id
}

// NewChain is a VM with the RAM of a seed.
func NewChain(vm string, seed int64) *Chain {
	ram, _ := Content(seed)
	return &Chain{VM: vm, Rand: rand.New(rand.NewSource(seed)), RAM: ram, Want: map[string][]byte{}}
}

// Change gives some pages of RAM another content.
func (c *Chain) Change() {
	for range 1 + c.Rand.Intn(6) {
		p := c.RAM[c.Rand.Intn(Pages)*4096:][:4096]
		switch c.Rand.Intn(4) {
		case 0:
			clear(p)
		case 1:
			copy(p, c.RAM[c.Rand.Intn(Pages)*4096:][:4096])
		default:
			c.Rand.Read(p[:1+c.Rand.Intn(4096)])
		}
	}
}

// Write writes the files of a checkpoint that continues the VM's newest one, and returns
// its manifest, ready for Commit. o.Key nil: that of the VM.
func (c *Chain) Write(ctx context.Context, s *store.Store, txn *store.Txn, o image.WriterOptions) (*image.Manifest, error) {
	key, err := s.TagKey(ctx, "vm:"+c.VM)
	if err != nil {
		return nil, err
	}
	o.Key, o.FS, o.VM = key, txn.FS(), c.VM
	parent, err := s.OpenParent(ctx, c.VM, "", key)
	if err != nil {
		return nil, err
	}
	m := Manifest()
	if parent != nil {
		defer parent.Close()
		o.Parent, m.Parent, m.Depth = parent.Reader, parent.Manifest().ID, parent.Manifest().Depth+1
	}
	w, err := image.NewWriter(txn.Dir(), Blocks(), o)
	if err != nil {
		return nil, err
	}
	defer w.Abort()
	const step = 8 * 4096
	for off := 0; off < len(c.RAM); off += step {
		if err := w.WritePages(0, uint64(off/4096), c.RAM[off:off+step]); err != nil {
			return nil, err
		}
	}
	if err := w.WriteDeviceState(bytes.NewReader(c.RAM[:100])); err != nil {
		return nil, err
	}
	sum, err := w.Finish(ctx)
	if err != nil {
		return nil, err
	}
	sum.Apply(m)
	return m, nil
}

// Next changes RAM and takes a checkpoint.
func (c *Chain) Next(t testing.TB, s *store.Store, o image.WriterOptions) string {
	t.Helper()
	ctx := context.Background()
	c.Change()
	txn, err := s.Begin(ctx, c.VM)
	if err != nil {
		t.Fatal(err)
	}
	m, err := c.Write(ctx, s, txn, o)
	if err == nil {
		err = txn.Commit(ctx, m)
	}
	if err != nil {
		txn.Abort()
		t.Fatal(err)
	}
	c.Want[txn.ID()] = bytes.Clone(c.RAM)
	return txn.ID()
}

// Check reads back every checkpoint of the VM that there is, and returns their number.
func (c *Chain) Check(t testing.TB, s *store.Store) int {
	t.Helper()
	ctx := context.Background()
	list, err := s.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, i := range list {
		if i.VM != c.VM {
			continue
		}
		n++
		want, known := c.Want[i.ID]
		if !known {
			t.Fatalf("checkpoint %s was never taken", i.ID)
		}
		c.check(t, s, i.ID, want)
	}
	return n
}

func (c *Chain) check(t testing.TB, s *store.Store, id string, want []byte) {
	t.Helper()
	img, err := s.OpenImage(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got := make([]byte, len(want))
	if _, err := img.ReadRun(0, 0, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("checkpoint %s: RAM differs", id)
	}
	if err := img.Verify(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
}
