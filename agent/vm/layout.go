package vm

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/ckagent/ckagent/agent/problem"
)

var (
	errAmbiguous = errors.New("cannot be told apart")
	errMoved     = errors.New("the memory layout changed while it was read")
)

// mapBytes is the length of the mapping: QEMU rounds up to the page size.
func (b *ramblockLine) mapBytes() uint64 { return (b.total + b.pageBytes - 1) &^ (b.pageBytes - 1) }

// ResolveLayout finds where every RAM block of the machine lies, or refuses. It
// changes nothing; it reads /proc/PID and asks the monitor.
//
// Without hints everything is established and cross-checked (tens of ms). With
// hints, blocks recorded from the same machine before, names, sizes, GPA and Main
// are compared with them and the expensive readings (smaps, the memory tree) are
// left out; blocks that do not match the hints make it fall back to the long way.
// The result is sorted as QEMU lists its blocks.
func ResolveLayout(ctx context.Context, p *Process, q Monitor, hints []RAMBlock) ([]RAMBlock, error) {
	const attempts = 3 // hotplug or an ACPI table resize in between is rare and short
	var err error
	for range attempts {
		var blocks []RAMBlock
		if blocks, err = resolveOnce(ctx, p, q, hints); err == nil {
			return blocks, nil
		}
		if !errors.Is(err, errMoved) {
			break
		}
	}
	if gone := p.Check(); gone != nil {
		return nil, gone
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	var known *problem.Error
	if errors.As(err, &known) {
		return nil, err
	}
	code, hint := problem.Failed, ""
	switch {
	case errors.Is(err, errAmbiguous), errors.Is(err, errHMP):
		code, hint = problem.Refused, "this QEMU's memory layout is not understood; a support bundle of this VM helps to teach it"
	case errors.Is(err, errMoved):
		code, hint = problem.Busy, "memory is being plugged; try again"
	}
	return nil, problem.New(code, "resolve memory layout", p.String(), "%w", err).WithHint("%s", hint)
}

func resolveOnce(ctx context.Context, p *Process, q Monitor, hints []RAMBlock) ([]RAMBlock, error) {
	a := &ahead{probe: probeOf(hints)}
	var g errgroup.Group
	if len(hints) > 0 {
		g.Go(func() error { return a.look(p) })
	}
	if a.probe != nil {
		g.Go(func() (err error) { a.answer, err = q.HMP(ctx, fmt.Sprintf("gpa2hva 0x%x", a.probe.GPA)); return err })
	}
	text, err := q.HMP(ctx, "info ramblock")
	if gerr := g.Wait(); err == nil {
		err = gerr
	}
	if err != nil {
		return nil, err
	}
	lines, err := parseRAMBlocks(text)
	if err != nil {
		return nil, err
	}
	r := &resolver{p: p, q: q, lines: lines, host: make(map[string]uint64), how: make(map[string]string)}
	if matchHints(lines, hints) {
		return r.fast(ctx, hints, a)
	}
	blocks, err := r.full(ctx)
	if err != nil {
		return nil, err
	}
	// Hotplug while we looked would have mixed two layouts.
	again, err := q.HMP(ctx, "info ramblock")
	if err != nil {
		return nil, err
	}
	if again != text {
		return nil, errMoved
	}
	return blocks, nil
}

// ahead is what fast needs beside the list of blocks. It is had together with it: a
// monitor answers several questions almost as soon as one.
type ahead struct {
	vmas   []VMA
	probe  *RAMBlock // whose guest address was asked for; nil: no hint has one
	answer string
	seed   uint64 // its record in QEMU's heap, as far as that can be told yet; or 0
}

// look reads the mappings and looks for the probe's record among them.
func (a *ahead) look(p *Process) (err error) {
	if a.vmas, err = p.ReadMaps(); err != nil || a.probe == nil {
		return err
	}
	a.seed = newRecordFinder(processMemory{p.PID}, a.vmas).seed(a.probe)
	return nil
}

// probeOf is the largest block of guest RAM proper that is mapped.
func probeOf(hints []RAMBlock) (probe *RAMBlock) {
	for i := range hints {
		if h := &hints[i]; h.GPA >= 0 && h.Main && (probe == nil || h.TotalBytes > probe.TotalBytes) {
			probe = h
		}
	}
	return probe
}

// matchHints reports whether hints name exactly these blocks with these sizes.
// Used may differ: resizable blocks take the incoming size later.
func matchHints(lines []ramblockLine, hints []RAMBlock) bool {
	if len(hints) != len(lines) {
		return false
	}
	byName := make(map[string]*RAMBlock, len(hints))
	for i := range hints {
		byName[hints[i].Name] = &hints[i]
	}
	for i := range lines {
		h := byName[lines[i].name]
		if h == nil || h.TotalBytes != lines[i].total {
			return false
		}
	}
	return true
}
