package restore

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
)

// TestRehearsalLosesMonitor: a monitor that breaks off says nothing about the guest, and so
// nothing about the checkpoint.
func TestRehearsalLosesMonitor(t *testing.T) {
	dir := t.TempDir()
	sh, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "qemu-system-x86_64")
	if err := os.WriteFile(bin, sh, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-c", "echo up; read line")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		_ = cmd.Wait() // a shell that reads no line says so
	}()
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "qmp")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() { served <- breakOff(l) }()
	err = watchRunning(t.Context(), &Result{QEMUPID: cmd.Process.Pid, QMP: path, Name: "x"}, time.Minute)
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if err == nil || problem.CodeOf(err) != problem.Failed {
		t.Errorf("%s: %v", problem.CodeOf(err), err)
	}
}

// breakOff is a monitor that says that the guest runs, and ends.
func breakOff(l net.Listener) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Fprint(c, `{"QMP":{"version":{"qemu":{"micro":0,"minor":2,"major":7},"package":""},"capabilities":["oob"]}}`+"\r\n")
	for r := bufio.NewReader(c); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		_, id, _ := strings.Cut(line, `"id":`)
		id = strings.TrimRight(strings.SplitN(id, ",", 2)[0], "}\r\n")
		reply := "{}"
		if strings.Contains(line, "query-status") {
			reply = `{"running":true,"status":"running"}`
		}
		if _, err := fmt.Fprintf(c, `{"return":%s,"id":%s}`+"\r\n", reply, id); err != nil {
			return err
		}
		if strings.Contains(line, "query-status") {
			return nil
		}
	}
}
