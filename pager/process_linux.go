package pager

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// parentFD is the connection to the parent in the process that serves.
const parentFD = 3

// startProcess starts this program again, with a connection to it.
func startProcess(variable string) (*exec.Cmd, *net.UnixConn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "child")
	defer theirs.Close()
	conn, err := connection(pair[0])
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args[:1]
	cmd.Env = append(os.Environ(), variable)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{theirs}                   // parentFD
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what interrupts this process is not for it
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, nil, err
	}
	return cmd, conn, nil
}

// restart gives this program a priority, in the process that ServeProcess started.
// Threads have each their own: so that all do, one has it and starts the program
// anew.
func restart(nice int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, nice); err != nil {
		return fmt.Errorf("pager: priority %d needs CAP_SYS_NICE, or a limit RLIMIT_NICE of %d: %w", nice, 20-nice, err)
	}
	return os.NewSyscallError("execve", unix.Exec("/proc/self/exe", os.Args, os.Environ()))
}

// parent returns the connection to the process that started this one.
func parent() (*net.UnixConn, error) { return connection(parentFD) }

func connection(fd int) (*net.UnixConn, error) {
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("descriptor %d is no unix socket", fd)
	}
	return unixConn, nil
}
