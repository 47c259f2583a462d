package restore

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// takeCheckpoint stops a machine and writes down everything: the simplest thing
// that makes a checkpoint, and no code of the capture that restore is used with.
// The machine stays stopped.
func takeCheckpoint(t testing.TB, v *vmtest.VM, st *store.Store, edit func(m *image.Manifest)) string {
	t.Helper()
	return takeCheckpointOf(t, v.Config(), v.PID(), v.QMPPath(), st, edit)
}

func takeCheckpointOf(t testing.TB, cfg vmtest.Config, pid int, socket string, st *store.Store, edit func(m *image.Manifest)) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ep, err := qmp.ParseEndpoint(socket)
	must(err)
	c, err := qmp.Dial(ctx, ep)
	must(err)
	defer c.Close()
	p, err := vm.OpenProcess(pid)
	must(err)
	defer p.Close()
	must(c.Execute(ctx, "stop", nil, nil))
	stopped := time.Now().UTC()
	dev := filepath.Join(t.TempDir(), "state")
	must(c.Execute(ctx, "xen-save-devices-state", map[string]any{"filename": dev, "live": false}, nil))
	state, err := os.ReadFile(dev)
	must(err)
	var machine string
	must(c.Execute(ctx, "qom-get", map[string]string{"path": "/machine", "property": "type"}, &machine))
	blocks, err := vm.ResolveLayout(ctx, p, c, nil)
	must(err)

	var ib []image.Block
	for _, b := range blocks {
		ib = append(ib, image.Block{Name: b.Name, UsedBytes: b.UsedBytes, TotalBytes: b.TotalBytes, PageBytes: 4096,
			BackingPageBytes: b.PageBytes, GPA: b.GPA, Backing: string(b.Backing), Shared: b.Shared, ReadOnly: b.ReadOnly, Main: b.Main})
	}
	txn, err := st.Begin(ctx, cfg.Name)
	must(err)
	defer txn.Abort()
	w, err := image.NewWriter(txn.Dir(), ib, image.WriterOptions{})
	must(err)
	const chunk = 4 << 20
	for i, b := range blocks {
		for at := uint64(0); at < b.UsedBytes; at += chunk {
			n := min(chunk, b.UsedBytes-at)
			data, err := vmtest.ReadRAM(pid, b.HVA+at, n)
			must(err)
			must(w.WritePages(i, at/4096, data))
		}
	}
	must(w.WriteDeviceState(bytes.NewReader(state)))
	sum, err := w.Finish(ctx)
	must(err)
	boot, err := liveness.BootID()
	must(err)
	m := &image.Manifest{
		VM: cfg.Name, CreatedAt: stopped, Mode: "stop", Engine: "none",
		QEMU: image.QEMU{Version: c.Version().String(), BinaryPath: p.Exe},
		Machine: image.Machine{Type: strings.TrimSuffix(machine, "-machine"), Accel: cfg.Accel, Argv: slices.Clone(p.Argv),
			UID: p.UID, GID: p.GID, Cwd: p.Cwd, Facts: map[string]string{
				image.FactQEMUPID: strconv.Itoa(p.PID), image.FactQEMUStart: strconv.FormatUint(p.StartTicks, 10), image.FactBootID: boot}},
	}
	for _, kv := range cfg.QEMU.Env {
		name, value, _ := strings.Cut(kv, "=")
		m.Machine.Env = append(m.Machine.Env, image.EnvVar{Name: name, Value: value})
	}
	sum.Apply(m)
	m.ID = txn.ID()
	if edit != nil {
		edit(m)
	}
	must(txn.Commit(ctx, m))
	return txn.ID()
}
