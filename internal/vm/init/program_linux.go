package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/internal/vm/job"
)

// After its limit a program gets SIGQUIT, which makes Go print the stacks of
// all goroutines, then SIGKILL. One that sleeps in the kernel for good
// survives even that. When the kernel has a bug, the program may wait for
// ever, so that it gets little time from then on.
const (
	stacksWait = 15 * time.Second
	killWait   = 5 * time.Second
	bugWait    = 10 * time.Second
)

// runProgram runs p and everything it started to its end. With an error there
// is no going on, but if the program was started there is its end too.
func runProgram(p *job.Program, kmsg *kernelLog) (*job.Exit, error) {
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer stdin.Close()
	attr := &os.ProcAttr{
		Dir:   p.Dir,
		Env:   p.Env,
		Files: []*os.File{stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	if p.UID != 0 {
		id := uint32(p.UID)
		attr.Sys.Credential = &syscall.Credential{Uid: id, Gid: id}
	}
	start := time.Now()
	process, err := os.StartProcess(p.Path, append([]string{p.Path}, p.Args...), attr)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Path, err)
	}
	ended := make(chan unix.WaitStatus, 1)
	go reap(process.Pid, ended)

	exit := &job.Exit{}
	limit := time.After(p.Limit)
	kernelCheck := time.NewTicker(time.Second)
	defer kernelCheck.Stop()
	signals := []unix.Signal{unix.SIGQUIT, unix.SIGKILL}
	bug := false
	for {
		select {
		case status := <-ended:
			exit.Code = status.ExitStatus()
			if status.Signaled() {
				exit.Code = 128 + int(status.Signal())
			}
			exit.Elapsed = time.Since(start)
			return exit, endOthers()
		case <-kernelCheck.C:
			kmsg.read()
			if len(kmsg.bad) > 0 && !bug {
				bug = true
				if !exit.TimedOut {
					limit = time.After(bugWait)
				}
			}
		case <-limit:
			exit.TimedOut = !bug
			if len(signals) == 0 {
				exit.Code = 128 + int(unix.SIGKILL)
				exit.Elapsed = time.Since(start)
				return exit, fmt.Errorf("%s cannot be killed, it sleeps in the kernel:\n%s", p.Path, sleepers())
			}
			if signals[0] == unix.SIGQUIT {
				fmt.Printf("\nvm: %s still runs after %v; where its threads sleep in the kernel:\n%s",
					p.Path, time.Since(start).Round(time.Second), sleepers())
				limit = time.After(stacksWait)
			} else {
				limit = time.After(killWait)
			}
			unix.Kill(process.Pid, signals[0])
			signals = signals[1:]
		}
	}
}

// reap waits for every child, as PID 1 must: orphans become its children.
// It sends the status of the one with this pid, and then ends.
func reap(pid int, ended chan<- unix.WaitStatus) {
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(-1, &status, 0, nil)
		if got == pid {
			ended <- status
			return
		}
		if err != nil && err != unix.EINTR {
			return // ECHILD: cannot be, the program has not been waited for
		}
	}
}

// endOthers kills all processes that a program has left behind.
func endOthers() error {
	if err := unix.Kill(-1, unix.SIGKILL); err == unix.ESRCH {
		return nil
	}
	deadline := time.Now().Add(killWait)
	for time.Now().Before(deadline) {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if err == unix.ECHILD {
			return nil
		}
		if pid == 0 {
			time.Sleep(10 * time.Millisecond)
		}
	}
	return fmt.Errorf("a process left behind cannot be killed, it sleeps in the kernel:\n%s", sleepers())
}

// sleepers returns a line for each thread of user space: its state, its name
// and the kernel functions it sleeps in.
func sleepers() string {
	var b strings.Builder
	threads, _ := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	for _, dir := range threads {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil || strings.HasPrefix(dir, "/proc/1/") {
			continue
		}
		if exe, err := os.Readlink(filepath.Join(dir, "exe")); err != nil || exe == "" {
			continue // a thread of the kernel
		}
		stack, _ := os.ReadFile(filepath.Join(dir, "stack"))
		var functions []string
		for line := range strings.Lines(string(stack)) {
			if fields := strings.Fields(line); len(fields) == 2 {
				function, _, _ := strings.Cut(fields[1], "+")
				functions = append(functions, function)
			}
		}
		open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
		name, state := string(stat[open+1:end]), string(stat[end+2:end+3])
		fmt.Fprintf(&b, "vm: thread %s %s (%s): %s\n", filepath.Base(dir), state, name, strings.Join(functions, " < "))
	}
	return b.String()
}

// sendFiles reports the file, or all files in the folder, at path.
func sendFiles(nonce, path string) error {
	return filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the program did not write it
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		report(nonce, job.Event{File: &job.File{Path: path, Data: data}})
		return nil
	})
}
