package vm

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/ckagent/ckagent/agent/qmp"
)

// markReported notes the blocks in which a page may be discarded and used again
// without a trace: those in files, in a VM whose guest reports its free pages. (In
// anonymous memory a discarded page loses its mark; a balloon's pages are used again
// only when it moves, which QEMU tells.)
func (t *Target) markReported(ctx context.Context, blocks []RAMBlock) error {
	on := false
	for _, dir := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		children, err := qomList(ctx, t.QMP, dir)
		if err != nil {
			return fmt.Errorf("qom-list %s: %w", dir, err)
		}
		for _, c := range children {
			if typ, ok := c.object(); !ok || !strings.HasPrefix(typ, "virtio-balloon") {
				continue
			}
			v, err := qomGet[bool](ctx, t.QMP, dir+"/"+c.Name, "free-page-reporting")
			if _, refused := errors.AsType[*qmp.Error](err); err != nil && !refused {
				return fmt.Errorf("balloon %s: %w", c.Name, err)
			}
			on = on || v
		}
	}
	for i := range blocks {
		blocks[i].Reported = on && blocks[i].Main && blocks[i].Backing != Anonymous
	}
	return nil
}

// BalloonBytes is what the balloon leaves the guest; ok is false without a balloon.
func (t *Target) BalloonBytes(ctx context.Context) (n uint64, ok bool, err error) {
	var b struct {
		Actual uint64 `json:"actual"`
	}
	err = t.QMP.Execute(ctx, "query-balloon", nil, &b)
	if _, refused := errors.AsType[*qmp.Error](err); refused {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("query-balloon: %w", err)
	}
	return b.Actual, true, nil
}
