//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/handoff"
	"github.com/go-uffd/uffd/pager"
)

// A server serves the tasks of one restore.
type server struct {
	log   *log.Logger
	delay time.Duration

	pager   pager.Pager
	regions map[int32][]pager.Region // what is missing in each task
	tasks   []*task
	serving sync.WaitGroup
}

// A task is a process that is served.
type task struct {
	pid    int32 // in the images
	file   *uffd.File
	client *pager.Client
	gone   chan struct{} // closed when the process is, and its children
	since  time.Time
}

func (s *server) run(images, work string, ready int) error {
	pids, err := s.load(images)
	if err != nil {
		return err
	}
	conn, err := s.accept(work, ready)
	if err != nil {
		return err
	}
	// Whoever ends us now ends the processes, or worse.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE)
	defer s.close()
	// Restore fails if it cannot say that it has finished. It must not go on with
	// memory that nobody serves: so the connection is closed first.
	defer conn.Close()
	s.pager.UnknownZero = true
	s.pager.ErrorHook = func(_ *pager.Client, err error) { s.log.Print(err) }
	if err := s.receive(conn, pids); err != nil {
		return err
	}
	return s.complete()
}

// load reads what the images say.
func (s *server) load(dir string) (pids []int32, err error) {
	pids, err = readTree(dir)
	if err != nil {
		return nil, err
	}
	s.regions = make(map[int32][]pager.Region)
	for _, pid := range pids {
		if _, err := os.Stat(filepath.Join(dir, fmt.Sprintf("mm-%d.img", pid))); errors.Is(err, os.ErrNotExist) {
			continue // a zombie
		}
		if s.regions[pid], err = lazyRegions(dir, pid); err != nil {
			return nil, err
		}
	}
	return pids, nil
}

// accept waits for restore.
func (s *server) accept(work string, ready int) (*net.UnixConn, error) {
	// The length of a socket's name is limited.
	if err := os.Chdir(work); err != nil {
		return nil, err
	}
	const name = "lazy-pages.socket"
	if info, err := os.Lstat(name); err == nil && info.Mode().Type() == os.ModeSocket {
		os.Remove(name) // of one that was killed
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	s.log.Printf("waiting for restore on %s", filepath.Join(work, name))
	if ready >= 0 {
		status := os.NewFile(uintptr(ready), "status")
		_, err := status.Write([]byte{0})
		if err := errors.Join(err, status.Close()); err != nil {
			return nil, err
		}
	}
	return l.AcceptUnix()
}

// restoreFinished is what restore sends at last.
const restoreFinished = 0x52535446

// receive takes the tasks from restore, and serves them, until all of them run.
func (s *server) receive(conn *net.UnixConn, pids []int32) error {
	for range pids {
		var pid int32
		if err := binary.Read(conn, binary.NativeEndian, &pid); err != nil {
			return fmt.Errorf("waiting for the tasks: %w", hungUp(err))
		}
		if pid < 0 { // a zombie
			continue
		}
		if err := s.serve(conn, pid); err != nil {
			return fmt.Errorf("task %d: %w", pid, err)
		}
	}
	var word uint32
	if err := binary.Read(conn, binary.NativeEndian, &word); err != nil {
		return fmt.Errorf("waiting for the end of restore: %w", hungUp(err))
	}
	if word != restoreFinished {
		return fmt.Errorf("restore has sent %#x, and should have sent %#x", word, restoreFinished)
	}
	s.log.Print("all tasks run")
	return nil
}

func hungUp(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		return errors.New("restore hung up: it has failed")
	}
	return err
}

// serve receives the userfaultfd of a task, and begins to serve it.
func (s *server) serve(conn *net.UnixConn, pid int32) error {
	var zero [1]byte
	file, err := handoff.Receive(context.Background(), conn, zero[:])
	if err != nil {
		return err
	}
	t := &task{pid: pid, file: file, gone: make(chan struct{}), since: time.Now()}
	s.tasks = append(s.tasks, t)
	regions, ok := s.regions[pid]
	if !ok {
		return errors.New("it came twice, or has no images")
	}
	delete(s.regions, pid)
	if missing := pager.Events &^ file.Features(); missing != 0 {
		return fmt.Errorf("its userfaultfd lacks %v: what becomes of its memory would go unnoticed", missing)
	}
	if t.client, err = s.pager.Attach(file, regions...); err != nil {
		return err
	}
	s.serving.Go(func() {
		for {
			err := t.client.Serve(context.Background())
			if err == nil {
				close(t.gone)
				return
			}
			if errors.Is(err, os.ErrClosed) {
				return
			}
			s.log.Printf("task %d: %v", pid, err) // without us it would read zeros
			time.Sleep(time.Second)
		}
	})
	return nil
}

// complete fills the memory of all tasks. It returns when none of them needs us
// any more.
func (s *server) complete() error {
	s.wait()
	var errs []error
	var needy []*task
	for _, t := range s.tasks {
		if err := s.fill(t); err != nil {
			s.log.Printf("task %d needs to be served until it exits: %v", t.pid, err)
			errs = append(errs, fmt.Errorf("task %d: %w", t.pid, err))
			needy = append(needy, t)
			continue
		}
		s.report(t)
	}
	for _, t := range needy {
		<-t.gone
		s.report(t)
	}
	return errors.Join(errs...)
}

// fill fills the memory of a task.
func (s *server) fill(t *task) error {
	err := t.client.Populate(context.Background(), nil)
	if err == nil {
		return nil
	}
	select {
	case <-t.gone: // that is why
		return nil
	case <-time.After(time.Second):
		return err
	}
}

// wait waits for the time that the tasks are to be left alone, or until all of
// them are gone.
func (s *server) wait() {
	timer := time.After(s.delay)
	for _, t := range s.tasks {
		select {
		case <-t.gone:
		case <-timer:
			return
		}
	}
}

func (s *server) report(t *task) {
	n := t.client.Stats()
	s.log.Printf("task %d: complete after %v: %d faults, %d pages on demand, %d around them, %d in the background; "+
		"%d zero; %d forks, %d moves, %d discards, %d unmaps; a fault took %v (median), %v (99 %%)",
		t.pid, time.Since(t.since).Round(time.Millisecond), n.Missing, n.Demand, n.Around, n.Populated,
		n.Zeroed+n.Unknown, n.Forks, n.Remaps, n.Removes, n.Unmaps, n.Total.Quantile(0.5), n.Total.Quantile(0.99))
}

// close lets go of all tasks.
func (s *server) close() {
	for _, t := range s.tasks {
		if t.client != nil {
			t.client.Close()
		}
		t.file.Close()
	}
	s.serving.Wait()
}
