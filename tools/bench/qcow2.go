package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm/disk"
	"github.com/ckagent/ckagent/tools/bench/report"
)

// Names of the ways to keep memory and a disk of one instant.
const (
	wayBackup  = "ckagent, --disks backup"
	wayOverlay = "ckagent, --disks overlay"
	// The only way to get both with QEMU alone: its snapshot resumes the machine by
	// itself, so the disk has to be switched before.
	wayTogether = "stop, overlay, background-snapshot"
	// What QEMU would need if the two could be had in one pause without what starting
	// a migration costs: no machine can be saved like that.
	wayApart = "background-snapshot's pause + overlay's"

	fSwitch = "switch" // of the disk to an overlay, in a pause of its own
)

// diskGuest has its RAM in small pages, as any guest that was checkpointed before.
var diskGuest = guestSpec{memoryMiB: 1024, usedMiB: 512, devices: 2, small: true, disk: true}

const diskGens = 3 // guests of each way: each has one first checkpoint

// withDisk compares pauses that keep a disk as well.
func (b *bench) withDisk(ctx context.Context) error {
	ways := []*way{
		{name: wayBackup, op: func(ctx context.Context, g *guest, dir string) (figures, []stage, error) {
			return b.checkpoint(ctx, g, dir)
		}},
		{name: wayOverlay, op: func(ctx context.Context, g *guest, dir string) (figures, []stage, error) {
			return b.checkpoint(ctx, g, dir, "--disks", "overlay")
		}},
		{name: wayTogether, op: b.snapshotWithOverlay},
		{name: wayApart, op: b.snapshotAndOverlay},
	}
	rounds, gens := b.rounds(14, 4), diskGens
	if b.Quick {
		rounds, gens = 2, 1
	}
	for range gens {
		if err := b.diskGeneration(ctx, ways, rounds); err != nil {
			return err
		}
	}
	b.diskRows(ways)
	return nil
}

// diskGeneration measures on one fresh guest of each way, in alternation. A way keeps
// its directory: its second checkpoint continues the first.
func (b *bench) diskGeneration(ctx context.Context, ways []*way, rounds int) error {
	dirs := map[*way]string{}
	defer func() {
		closeGuests(ways)
		for _, dir := range dirs {
			_ = os.RemoveAll(dir) // the run's own directory goes in the end
		}
	}()
	if err := launchGuests(ctx, ways, diskGuest); err != nil {
		return err
	}
	for _, w := range ways {
		var err error
		if dirs[w], err = os.MkdirTemp(b.dir, "disk-"); err != nil {
			return err
		}
	}
	for round := range rounds {
		for _, w := range ways {
			o, err := w.guest.measure(ctx, dirs[w], w.op)
			if err != nil {
				return fmt.Errorf("%s, checkpoint %d: %w", w.name, round+1, err)
			}
			into := &w.later
			if round == 0 {
				into = &w.first
			}
			into.Add(fPause, o.figures[fPause]+o.figures[fSwitch])
			if err := w.guest.stop(ctx); err != nil {
				return err
			}
		}
		b.Log("qcow2: round %d of %d", round+1, rounds)
	}
	for _, w := range ways {
		if r := w.guest.Report(); r.Check() != nil {
			return fmt.Errorf("the guest of %s: %w", w.name, r.Check())
		}
	}
	return nil
}

// prepareOverlay makes an overlay for the guest's disk and encodes the switch to it.
// What it returns commits the overlay again.
func (g *guest) prepareOverlay(ctx context.Context) (_ *qmp.Request, back func() error, err error) {
	graph, err := disk.Read(ctx, g.q)
	if err != nil {
		return nil, nil, err
	}
	sources, refused := graph.Sources()
	if len(sources) != 1 || len(refused) > 0 {
		return nil, nil, fmt.Errorf("the guest has %d disks: %v", len(sources), refused)
	}
	// On the disk's own file system, as ckagent's.
	path := sources[0].Path + ".bench"
	create := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b", sources[0].Path, path, fmt.Sprint(sources[0].Bytes))
	if out, err := create.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("qemu-img create: %w: %s", err, out)
	}
	err = g.q.Execute(ctx, "blockdev-add", map[string]any{"driver": "qcow2", "node-name": disk.OverlayNode(0), "backing": nil,
		"file": map[string]any{"driver": "file", "filename": path}}, nil)
	if err != nil {
		return nil, nil, err
	}
	r, err := qmp.Encode("transaction", map[string]any{"actions": []any{map[string]any{"type": "blockdev-snapshot",
		"data": map[string]any{"node": sources[0].Image, "overlay": disk.OverlayNode(0)}}}})
	return r, func() error {
		_, err := disk.Sweep(ctx, g.q, false)
		return errors.Join(err, os.Remove(path))
	}, err
}

// snapshotWithOverlay is QEMU's own copy-on-write snapshot of a machine whose disk was
// switched to an overlay in the same pause. The overlay is committed when all is done.
func (b *bench) snapshotWithOverlay(ctx context.Context, g *guest, dir string) (figures, []stage, error) {
	begin := time.Now()
	change, back, err := g.prepareOverlay(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop, err := qmp.Encode("stop", nil)
	if err != nil {
		return nil, nil, err
	}
	n, err := g.migrate(ctx, filepath.Join(dir, "snapshot"), true, stop, change)
	took := time.Since(begin)
	return figures{fBytes: n, fTotal: float64(took)}, nil, errors.Join(err, back())
}

// snapshotAndOverlay is the snapshot by itself, and the switch in a pause of its own.
func (b *bench) snapshotAndOverlay(ctx context.Context, g *guest, dir string) (figures, []stage, error) {
	begin := time.Now()
	n, err := g.migrate(ctx, filepath.Join(dir, "snapshot"), true)
	if err != nil {
		return nil, nil, err
	}
	change, back, err := g.prepareOverlay(ctx)
	if err != nil {
		return nil, nil, err
	}
	took, err := g.stopped(ctx, func() (float64, error) {
		begin := time.Now()
		calls, err := g.q.Send(change)
		if err == nil {
			err = calls[0].Wait(ctx, nil)
		}
		return float64(time.Since(begin)), err
	})
	f := figures{fBytes: n, fSwitch: took, fTotal: float64(time.Since(begin))}
	return f, nil, errors.Join(err, back())
}

// diskRows makes the table.
func (b *bench) diskRows(ways []*way) {
	group := "Memory and a disk of one instant: " + diskGuest.String()
	for i, ours := range ways[:2] {
		for j, peer := range ways[2:] {
			for _, when := range []struct {
				id, text  string
				ours, his *report.Figures
				goal      report.Goal
			}{
				{"first", "first", &ours.first, &peer.first, report.Goal{Text: "≤ 1x", Ratio: 1}},
				{"later", "second on", &ours.later, &peer.later, report.Goal{Text: "≤ 0.5x", Ratio: 0.5}},
			} {
				a, z := when.ours.Get(fPause), when.his.Get(fPause)
				b.row(report.Row{ID: fmt.Sprintf("qcow2/%s/%s/%d", []string{"backup", "overlay"}[i], when.id, j), Group: group,
					What: "pause, " + ours.name + ", " + when.text, Ours: a.Median(), Peer: z.Median(), PeerName: peer.name, N: min(len(a), len(z)), Goal: when.goal})
			}
		}
	}
}
