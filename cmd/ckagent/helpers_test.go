package main

import (
	"testing"

	"github.com/ckagent/ckagent/agent/guardian"
)

// An injection that broke off may have left a descriptor in QEMU: the guardian
// must still know of it when the fault server has ended.
func TestFailedInjectionStaysOnRecord(t *testing.T) {
	c, page, err := guardian.CreateControl()
	if err != nil {
		t.Fatal(err)
	}
	defer page.Close()
	defer c.Close()
	h := faultServerHooks{control: c}
	if f, err := h.takeUserfaultfd(1<<22-1, nil); err == nil {
		f.Close()
		t.Fatal("a process that does not exist gave a descriptor")
	}
	if c.Injecting.Load() != 1 {
		t.Error("the guardian would not look for what was left")
	}
}
