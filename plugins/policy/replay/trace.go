package replay

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/plugins/policy"
)

const (
	maxLines = 1 << 18
	maxLine  = 1 << 20 // bytes
	maxTrace = 1 << 30 // bytes, unpacked
)

// ErrTrace is what the errors about a trace match.
var ErrTrace = errors.New("not a trace of signals")

// Read reads a trace, which may be packed by gzip.
func Read(r io.Reader) ([]*policy.Signals, error) {
	var trace []*policy.Signals
	in := bufio.NewReader(r)
	r = in
	if magic, err := in.Peek(2); err == nil && bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		unpacked, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrTrace, err)
		}
		r = unpacked
	}
	sc := bufio.NewScanner(io.LimitReader(r, maxTrace))
	sc.Buffer(nil, maxLine)
	for n := 1; sc.Scan(); n++ {
		line := bytes.TrimSpace(sc.Bytes())
		if len(line) == 0 {
			continue
		}
		if len(trace) == maxLines {
			return nil, fmt.Errorf("%w: more than %d lines", ErrTrace, maxLines)
		}
		s := &policy.Signals{}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(line, s); err != nil {
			return nil, fmt.Errorf("%w: line %d: %w", ErrTrace, n, err)
		}
		if k := len(trace); s.GetNowNs() <= 0 || k > 0 && s.GetNowNs() <= trace[k-1].GetNowNs() {
			return nil, fmt.Errorf("%w: line %d: now_ns %d does not follow", ErrTrace, n, s.GetNowNs())
		}
		trace = append(trace, s)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTrace, err)
	}
	if len(trace) < 2 {
		return nil, fmt.Errorf("%w: %d lines; want 2 at least", ErrTrace, len(trace))
	}
	return trace, nil
}

// settled is how many checkpoints a protection has had when it no longer begins: the first
// one finds memory as nobody left it, and may be full or by another engine.
const settled = 3

// Repeat is a trace that was recorded, and then goes on as it did, so many times in all. The
// beginning of a protection that the trace tells of is not gone through again.
func Repeat(trace []*policy.Signals, times int) []*policy.Signals {
	last := len(trace) - 1
	out := make([]*policy.Signals, 0, times*len(trace))
	for _, s := range trace {
		out = append(out, proto.CloneOf(s))
	}
	again := trace[begun(trace):]
	period := trace[last].GetNowNs() - again[0].GetNowNs() + trace[last].GetNowNs() - trace[last-1].GetNowNs()
	for n := 1; n < times; n++ {
		for _, s := range again {
			s = proto.CloneOf(s)
			s.NowNs += int64(n) * period
			out = append(out, s)
		}
	}
	return out
}

// begun is the first line of a trace that tells of a protection which has settled; 0 if it
// tells of none, or of little else than its beginning.
func begun(trace []*policy.Signals) int {
	for i, s := range trace[:len(trace)/2] {
		taken := 0
		for _, c := range s.GetHistory() {
			if c.GetOk() {
				taken++
			}
		}
		if taken >= settled {
			return i
		}
	}
	return 0
}
