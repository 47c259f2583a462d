package export

import (
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm/ramstream"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
)

// remoteID is the number of the RAM section where the device sections cannot be
// listed (machine types before 2.4): they are numbered from 0, without large gaps.
const remoteID = 1 << 24

// writeQEMU writes a migration stream: what `migrate exec:cat` of the VM would have
// written at the checkpoint's instant, every page once.
func writeQEMU(x *exporter) error {
	stream, err := x.stream()
	if err != nil {
		return err
	}
	return stream.write(x)
}

// stream is a migration stream with everything but RAM in memory.
type stream struct {
	head, tail []byte
	id         uint32
}

// stream prepares the parts around RAM, so that what cannot be exported is known
// before the first byte.
func (x *exporter) stream() (*stream, error) {
	state, err := x.deviceState()
	if err != nil {
		return nil, err
	}
	s := &stream{id: remoteID}
	if s.head, s.tail, err = vmstate.Split(x.m.Machine.Type, state); err != nil {
		return nil, problem.New(problem.Integrity, "read device state", x.m.ID, "%w", err)
	}
	if id, err := vmstate.FreeID(state); err == nil {
		s.id = id
	}
	return s, nil
}

func (s *stream) write(x *exporter) error {
	blocks := make([]ramstream.Block, len(x.m.Blocks))
	for i, b := range x.m.Blocks {
		blocks[i] = ramstream.Block{Name: b.Name, UsedBytes: b.UsedBytes}
		x.total += b.UsedBytes
	}
	e := ramstream.NewEncoder(x.w, s.id, vmstate.HasFooters(x.m.Machine.Type))
	if err := e.Begin(s.head, blocks); err != nil {
		return err
	}
	for i, b := range x.m.Blocks {
		err := x.each(i, 0, b.UsedBytes, func(offset uint64, data []byte, n uint64) error {
			for at := uint64(0); at < n; at += ramstream.PageBytes {
				var err error
				if data == nil || image.IsZero(data[at:at+ramstream.PageBytes]) {
					err = e.Zero(i, offset+at)
				} else {
					err = e.Page(i, offset+at, data[at:at+ramstream.PageBytes])
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return e.End(s.tail)
}
