package capture

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/vm"
)

// imageBlocks describes the RAMBlocks for an image.
func imageBlocks(blocks []vm.RAMBlock) []image.Block {
	out := make([]image.Block, len(blocks))
	for i := range blocks {
		b := &blocks[i]
		out[i] = image.Block{
			Name: b.Name, UsedBytes: b.UsedBytes, TotalBytes: b.TotalBytes,
			PageBytes: source.PageBytes, BackingPageBytes: b.PageBytes, GPA: b.GPA,
			Backing: string(b.Backing), FileType: b.FileType, Path: b.FilePath,
			Shared: b.Shared, ReadOnly: b.ReadOnly, Main: b.Main,
		}
		for _, g := range b.Ranges {
			out[i].Ranges = append(out[i].Ranges, image.GPARange(g))
		}
	}
	return out
}

// sourceBlock says where a RAMBlock lies and how to tell its zero pages.
func sourceBlock(b *vm.RAMBlock) source.Block {
	s := source.Block{HVA: b.HVA, Pages: b.UsedBytes / source.PageBytes, Whole: b.PageBytes != source.PageBytes}
	switch {
	case b.Shared:
		s.Kind = source.Shared
	case b.Backing != vm.Anonymous:
		s.Kind = source.PrivateFile
	}
	return s
}

func (s *session) manifest(sum image.Summary, hot image.HotRuns, disks []image.Disk, total time.Duration) *image.Manifest {
	m := &image.Manifest{
		VM: s.sub.Name, CreatedAt: s.res.Timing.At,
		Mode: string(s.mode), Engine: string(s.engine),
		QEMU: s.sub.QEMU, Machine: s.sub.Machine, Hot: hot, Disks: disks, Parent: s.parent, Depth: s.depth,
	}
	// Whether the guest ran is known only now: somebody may have paused it since
	// the machine was described.
	m.Machine.Facts = maps.Clone(m.Machine.Facts)
	if m.Machine.Facts == nil {
		m.Machine.Facts = map[string]string{}
	}
	m.Machine.Facts[image.FactGuestRuns] = strconv.FormatBool(s.res.Timing.WasRunning)
	if n := len(s.res.Retaken); n > 0 {
		m.Machine.Facts[image.FactDiscarded] = strconv.Itoa(n)
		m.Machine.Facts[image.FactDiscardedReason] = s.res.Retaken[n-1]
	}
	if s.o.Quiesce != nil {
		m.Machine.Facts[image.FactFrozen] = "true"
	}
	sum.Apply(m)
	m.Stats.PauseNS = s.res.Timing.PauseNS
	m.Stats.DeviceStateNS = s.res.Timing.DeviceStateNS
	m.Stats.ArmNS = s.res.Capture.FreezeNS
	m.Stats.CapturedPages = s.res.Capture.FaultPages
	m.Stats.TotalNS = total.Nanoseconds()
	for _, d := range disks {
		if len(d.Volumes) > 0 {
			m.Stats.DiskBytes += d.Volumes[0].Bytes
		}
	}
	return m
}

// fingerprint is a digest of what a checkpoint's parts must agree on: RAMBlocks
// and devices. It changes with a hotplug or a resize in between.
func (s *session) fingerprint(ctx context.Context) (string, error) {
	q := s.target.QMP
	blocks, err := q.HMP(ctx, "info ramblock")
	if err != nil {
		return "", fmt.Errorf("read the machine's layout: %w", err)
	}
	h := sha256.New()
	fmt.Fprintln(h, blocks)
	for _, path := range []string{"/machine/peripheral", "/machine/peripheral-anon", "/objects"} {
		var list json.RawMessage
		if err := q.Execute(ctx, "qom-list", map[string]string{"path": path}, &list); err != nil {
			return "", fmt.Errorf("read the machine's devices: %w", err)
		}
		h.Write(list)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
