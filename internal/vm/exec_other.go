//go:build !linux

package vm

import "os/exec"

// dieTogether does nothing: a killed process leaves QEMU behind here, which
// ends by itself when its guest does.
func dieTogether(*exec.Cmd) (unlock func()) { return func() {} }
