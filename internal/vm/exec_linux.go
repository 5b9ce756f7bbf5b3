package vm

import (
	"os/exec"
	"runtime"
	"syscall"
)

// dieTogether has the kernel kill cmd when this process dies, however it does.
// The kernel watches the thread that starts cmd, so unlock is to be called
// only after cmd has ended.
func dieTogether(cmd *exec.Cmd) (unlock func()) {
	runtime.LockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return runtime.UnlockOSThread
}
