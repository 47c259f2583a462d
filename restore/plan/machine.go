package plan

import (
	"slices"

	"github.com/ckagent/ckagent/agent/cmdline"
)

// machine pins the versioned machine type and the accelerator: an alias such as
// "q35" means another machine after an upgrade, and "kvm:tcg" may fall back to
// an accelerator that the state was not saved on.
func (b *builder) machine() error {
	typed := false
	for e := range b.named("machine", "M") {
		if t := e.get("type"); t != "" {
			typed = true
			if t != b.rec.Machine {
				e.kv.Set("type", b.rec.Machine)
				b.change("-machine "+b.rec.Machine, "the recorded "+t+" may stand for another version")
			}
		}
		if a := e.get("accel"); a != "" && b.rec.Accel != "" && a != b.rec.Accel {
			e.kv.Set("accel", b.rec.Accel)
			b.change("accel="+b.rec.Accel, "the state was saved under it; "+a+" leaves a choice")
		}
	}
	if !typed {
		e := &entry{Option: cmdline.Option{Name: "machine", Value: b.rec.Machine, HasValue: true}, mapped: map[string]bool{}}
		var err error
		if e.kv, err = e.KeyVal(); err != nil {
			return b.refuse("machine type", "%w", err)
		}
		b.opts = slices.Insert(b.opts, 0, e)
		b.change("-machine "+b.rec.Machine, "the default may be another machine")
	}
	if b.rec.Accel == "" {
		return nil
	}
	accels := 0
	for range b.named("accel") {
		accels++
	}
	if accels > 1 {
		b.drop(func(e *entry) bool { return e.Name == "accel" && e.get("accel") != b.rec.Accel })
		b.change("-accel "+b.rec.Accel, "the state was saved under it; the others were its fallbacks")
	} else {
		for e := range b.named("accel") {
			if a := e.get("accel"); a != b.rec.Accel {
				e.kv.Set("accel", b.rec.Accel)
				b.change("-accel "+b.rec.Accel, "the state was saved under it, not "+a)
			}
		}
	}
	return nil
}
