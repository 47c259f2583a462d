package capture

import (
	"context"
	"fmt"
	"slices"

	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/qmp"
)

// stillness watches the guest's balloon during a copy-on-write capture of memory in
// files. A page that is discarded there and used again bears its mark, and is there:
// its copy would seem proved. A guest uses what it gave to its balloon again only
// after that has shrunk, which QEMU announces.
type stillness struct {
	events *qmp.Subscription // nil: nothing to watch
	bytes  uint64
}

// watchBalloon begins. Without a balloon, or with all memory anonymous, there is
// nothing to watch.
func (s *session) watchBalloon(ctx context.Context) (*stillness, error) {
	b := &stillness{}
	if s.mode != COW || !slices.ContainsFunc(s.blocks, func(b source.Block) bool { return b.Kind != source.Anonymous }) {
		return b, nil
	}
	events := s.target.QMP.Subscribe(8, "BALLOON_CHANGE")
	n, ok, err := s.target.BalloonBytes(ctx)
	if err != nil || !ok {
		events.Close()
		return b, err
	}
	b.events, b.bytes = events, n
	return b, nil
}

func (b *stillness) close() {
	if b.events != nil {
		b.events.Close()
	}
}

// broken returns an error if the balloon has moved.
func (b *stillness) broken(ctx context.Context, s *session) error {
	if b.events == nil {
		return nil
	}
	now, _, err := s.target.BalloonBytes(ctx)
	if err != nil {
		return err
	}
	// The answer comes after whatever was announced before.
	if n := len(b.events.C()); n > 0 || now != b.bytes {
		return s.captureError("capture RAM", &faultserver.Error{Failure: faultserver.Unproven,
			Detail: fmt.Sprintf("the balloon moved from %d to %d bytes, and a page of memory in a file may have been discarded and used again", b.bytes, now)})
	}
	return nil
}
