package pager

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/handoff"
	"github.com/go-uffd/uffd/source"
)

// A ProcessRegion is a [Region] whose source another process opens by name.
type ProcessRegion struct {
	Range    uffd.Range
	Source   string // the name, which means something to the function that ProcessMain has
	Offset   int64
	PageSize int
}

// ProcessMain makes [Pager.ServeProcess] possible: that starts this program again,
// and there ProcessMain serves the faults and does not return. Otherwise it
// returns at once. Call it at the start of main, before flags are parsed, and in
// tests at the start of TestMain.
//
// open opens a source by its name, which is not closed again.
func ProcessMain(open func(name string) (source.Source, error)) {
	hasProcessMain.Store(true)
	stage := os.Getenv(processVariable)
	if stage == "" {
		return
	}
	if err := serveParent(stage, open); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// processVariable is set in the environment of processes that ServeProcess
// starts: to the priority that they are to have, and then to processReady.
const (
	processVariable = "UFFD_PAGER_PROCESS"
	processReady    = "ready"
)

var hasProcessMain atomic.Bool

// ServeProcess serves the faults of f, as [Client.Serve] does, in a process of its
// own with the priority nice: from -20, the highest, to 19. For that it starts this
// program again (see [ProcessMain]). It returns when Serve does there, with what
// that returned. Whatever else this program does, faults are served without
// delay: Go's scheduler lets a loop that waits for messages wait up to 40
// milliseconds more if goroutines compute on all processors.
//
// The Pager's fields are used, with ErrorHook called for no Client, nil. Its Stats
// have the numbers when ServeProcess has returned. When ctx ends, or this process
// does, the other one stops; f stays the caller's, and its threads wait then.
// What the pager knew of the pages is gone after that: see the end of the
// package's description. If the other process dies, the faults that it had read
// come up again for whoever serves f next; but nobody else has the userfaultfds
// of children that the client has forked, so their missing memory reads as zeros.
//
// Errors: EACCES or EPERM if the priority needs privilege (CAP_SYS_NICE, or
// RLIMIT_NICE); what opening a source, Attach or Serve failed with, of which the
// text and the errno are left; [*exec.ExitError] if the process died; the error
// of ctx; errors.ErrUnsupported outside of Linux.
func (p *Pager) ServeProcess(ctx context.Context, f *uffd.File, nice int, rs ...ProcessRegion) (err error) {
	if !hasProcessMain.Load() {
		return errors.New("pager: ServeProcess starts this program again: call ProcessMain at the start of main")
	}
	process, conn, err := startProcess(processVariable + "=" + strconv.Itoa(nice))
	if err != nil {
		return fmt.Errorf("pager: starting a process: %w", err)
	}
	defer func() { // also if ErrorHook ends the goroutine
		conn.Close()
		died := process.Wait()
		for _, r := range rs {
			f.Wake(r.Range)
		}
		switch {
		case ctx.Err() != nil:
			err = ctx.Err()
		case died != nil:
			err = fmt.Errorf("pager: the process that serves died: %w", errors.Join(died, err))
		}
	}()
	defer context.AfterFunc(ctx, func() { conn.CloseWrite() })()
	if err := p.instruct(ctx, conn, f, rs); err != nil {
		return err
	}
	return p.listen(conn)
}

// An assignment is what the other process is to do.
type assignment struct {
	Workers, FaultAround int
	RetryFor             time.Duration
	OnFailure            Failure
	UnknownZero          bool
	Regions              []ProcessRegion
}

// A message comes from the other process.
type message struct {
	Text string

	Page   *uffd.Range // with it: a PageError
	Action Failure

	Over  bool // Serve has returned, with the error Text
	Errno syscall.Errno
	Stats Stats
}

// instruct hands over what there is to do.
func (p *Pager) instruct(ctx context.Context, conn *net.UnixConn, f *uffd.File, rs []ProcessRegion) error {
	if err := handoff.Send(ctx, conn, f, []byte{0}); err != nil {
		return err
	}
	return json.NewEncoder(conn).Encode(assignment{p.Workers, p.FaultAround, p.RetryFor, p.OnFailure, p.UnknownZero, rs})
}

// listen passes on what the other process says, until it is over.
func (p *Pager) listen(conn *net.UnixConn) error {
	messages := json.NewDecoder(conn)
	for {
		var m message
		if err := messages.Decode(&m); err != nil {
			return fmt.Errorf("pager: the process that serves hung up: %w", err)
		}
		switch {
		case m.Over:
			p.mu.Lock()
			p.retired.add(&m.Stats)
			p.mu.Unlock()
			switch {
			case m.Errno != 0:
				return &processError{m.Text, m.Errno}
			case m.Text != "":
				return errors.New(m.Text)
			}
			return nil
		case p.ErrorHook == nil:
		case m.Page != nil:
			p.ErrorHook(nil, &PageError{*m.Page, m.Action, errors.New(m.Text)})
		default:
			p.ErrorHook(nil, errors.New(m.Text))
		}
	}
}

// A processError is one from the other process.
type processError struct {
	text  string
	errno syscall.Errno
}

func (e *processError) Error() string { return e.text }
func (e *processError) Unwrap() error { return e.errno }

// serveParent is the life of the other process.
func serveParent(stage string, open func(name string) (source.Source, error)) error {
	if stage != processReady {
		nice, err := strconv.Atoi(stage)
		if err == nil {
			os.Setenv(processVariable, processReady)
			err = restart(nice)
		}
		return serveWith(func(context.Context, *Pager, *uffd.File, []ProcessRegion) error { return err })
	}
	os.Unsetenv(processVariable)
	return serveWith(func(ctx context.Context, p *Pager, f *uffd.File, rs []ProcessRegion) error {
		return p.serveRegions(ctx, f, rs, open)
	})
}

// serveWith is told by the parent what to serve, has serve do it, and tells the
// parent what came of it.
func serveWith(serve func(context.Context, *Pager, *uffd.File, []ProcessRegion) error) error {
	conn, err := parent()
	if err != nil {
		return fmt.Errorf("pager: %s is set in a process that ServeProcess did not start: %w", processVariable, err)
	}
	f, err := handoff.Receive(context.Background(), conn, make([]byte, 1))
	var a assignment
	if err == nil {
		err = json.NewDecoder(conn).Decode(&a)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) { // the parent thought better of it
		return nil
	}
	if err != nil {
		return fmt.Errorf("pager: being told what to serve: %w", err)
	}
	ctx, end := context.WithCancel(context.Background())
	defer end()
	go func() {
		defer end()
		io.Copy(io.Discard, conn) // until the parent hangs up
	}()

	say := speaker(conn)
	p := &Pager{Workers: a.Workers, FaultAround: a.FaultAround, RetryFor: a.RetryFor, OnFailure: a.OnFailure, UnknownZero: a.UnknownZero}
	p.ErrorHook = func(_ *Client, err error) {
		m := message{Text: err.Error()}
		if page, ok := errors.AsType[*PageError](err); ok {
			m = message{Text: page.Err.Error(), Page: &page.Page, Action: page.Action}
		}
		say(m)
	}
	over := message{Over: true}
	if err := serve(ctx, p, f, a.Regions); err != nil {
		over.Text = err.Error()
		over.Errno, _ = errors.AsType[syscall.Errno](err)
	}
	over.Stats = p.Stats()
	say(over)
	return nil
}

// speaker returns a function that sends messages, one at a time.
func speaker(conn *net.UnixConn) func(message) {
	line := make(chan *json.Encoder, 1)
	line <- json.NewEncoder(conn)
	return func(m message) {
		e := <-line
		e.Encode(m) // a parent that is gone need not know
		line <- e
	}
}

func (p *Pager) serveRegions(ctx context.Context, f *uffd.File, regions []ProcessRegion, open func(name string) (source.Source, error)) error {
	sources := make(map[string]source.Source)
	var rs []Region
	for _, r := range regions {
		if sources[r.Source] == nil {
			src, err := open(r.Source)
			if err != nil {
				return fmt.Errorf("pager: opening source %q in the process that serves: %w", r.Source, err)
			}
			sources[r.Source] = src
		}
		rs = append(rs, Region{Range: r.Range, Source: sources[r.Source], Offset: r.Offset, PageSize: r.PageSize})
	}
	c, err := p.Attach(f, rs...)
	if err != nil {
		return err
	}
	return c.Serve(ctx)
}
