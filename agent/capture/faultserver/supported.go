package faultserver

import (
	"fmt"

	"github.com/ckagent/ckagent/uffd"
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// Supported returns nil if the running kernel has what a capture needs, else
// what it lacks. It touches no other process.
func Supported() error {
	have, err := uffd.Probe()
	if err != nil {
		return fmt.Errorf("no userfaultfd to be had: %w", err)
	}
	if !have.Has(syncFeatures) {
		return fmt.Errorf("this kernel's userfaultfd lacks %s", syncFeatures&^have)
	}
	pm, err := pagemap.OpenSelf()
	if err != nil {
		return err
	}
	defer pm.Close()
	if !pm.CanScan() {
		return pagemap.ErrUnsupported
	}
	return nil
}
