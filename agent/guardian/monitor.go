package guardian

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent/qmp"
)

// maxLine bounds a QMP message; those of the commands used here are short, but
// the replies that are skipped need not be.
const maxLine = 16 << 20

// monitor is a taken-over QMP connection, used for one command at a time.
type monitor struct {
	conn net.Conn
	r    *bufio.Reader
	n    int
}

// takeMonitor brings the agent's connection back in step. Only its duplicate is
// closed by close.
func takeMonitor(ctx context.Context, f *os.File) (*monitor, error) {
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("QMP socket: %w", err)
	}
	if err := qmp.Resync(ctx, conn); err != nil {
		conn.Close()
		return nil, err
	}
	return &monitor{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}, nil
}

func (m *monitor) close() { m.conn.Close() }

// Execute runs one command and decodes what it returns.
func (m *monitor) Execute(ctx context.Context, command string, args, out any) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(monitorPatience)
	}
	if err := m.conn.SetDeadline(deadline); err != nil {
		return err
	}
	m.n++
	id := fmt.Sprintf("ckagent-guardian-%d", m.n)
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        string `json:"id"`
	}{command, args, id})
	if err != nil {
		return err
	}
	if _, err := m.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	for {
		line, err := m.line()
		if err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		var reply struct {
			ID     string          `json:"id"`
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Class, Desc string
			} `json:"error"`
		}
		// What does not fit (events, ids of another kind) is not for us.
		if json.Unmarshal(line, &reply) != nil || reply.ID != id {
			continue
		}
		if reply.Error != nil {
			return fmt.Errorf("%s: %s: %s", command, reply.Error.Class, reply.Error.Desc)
		}
		if out == nil {
			return nil
		}
		return json.Unmarshal(reply.Return, out)
	}
}

// line reads one message; a monitor in pretty mode spreads them over lines, which
// end where a line is just a closing brace.
func (m *monitor) line() ([]byte, error) {
	var msg []byte
	for {
		part, err := m.r.ReadSlice('\n')
		msg = append(msg, part...)
		if len(msg) > maxLine {
			return nil, errors.New("endless QMP message")
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if json.Valid(msg) {
			return msg, nil
		}
	}
}

// executor is what resuming needs of a monitor: ours, or a qmp.Client.
type executor interface {
	Execute(ctx context.Context, command string, args, out any) error
}

// resumeVM lets a VM that we paused go on, and nothing else: not one that runs,
// waits for a migration, was shut down, stopped on an error or paused by its
// manager.
func resumeVM(ctx context.Context, m executor) (before string, resumed bool, err error) {
	var st struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	if err := m.Execute(ctx, "query-status", nil, &st); err != nil {
		return "", false, err
	}
	if st.Running || st.Status != "paused" && st.Status != "save-vm" {
		return st.Status, false, nil
	}
	err = m.Execute(ctx, "cont", nil, nil)
	if qmp.IsManagerPaused(err) {
		return st.Status, false, nil
	}
	return st.Status, true, err
}
