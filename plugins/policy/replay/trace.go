package replay

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/ckagent/ckagent/plugins/policy"
)

const (
	maxLines = 1 << 18
	maxLine  = 1 << 20 // bytes
)

// ErrTrace is what the errors about a trace match.
var ErrTrace = errors.New("not a trace of signals")

// Read reads a trace.
func Read(r io.Reader) ([]*policy.Signals, error) {
	var trace []*policy.Signals
	sc := bufio.NewScanner(r)
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
