// Package devices makes docs/devices.md: which of QEMU's devices and backends a VM may
// have, found out by trying.
//
// Each row is a QEMU that was started with the device, looked at by `ckagent explain`,
// checkpointed, killed and restored, whereafter its guest had to go on. The test fails
// when what it sees is not what the table says;
//
//	go test ./tools/devices -run TestTable -args -update
//
// writes the table anew. A row whose device this host cannot offer keeps its text.
package devices
