package main

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/go-uffd/uffd/internal/vm/job"
)

// A test is one test or subtest, in one package on one guest.
type test struct {
	Name   string
	Result string // "PASS", "FAIL", "SKIP", or "" while it runs
	Log    []string
}

// An output reads what a test binary prints with -test.v=test2json, where
// lines of the framework's own begin with a control character.
type output struct {
	Tests   []*test
	byName  map[string]*test
	current *test
	last    []string // lines, whosever they are
	partial []byte
}

const (
	marker    = 0x16 // begins a line of the framework
	lastLines = 60   // is how many are kept
)

func (o *output) Write(p []byte) (int, error) {
	o.partial = append(o.partial, p...)
	for {
		line, rest, ok := bytes.Cut(o.partial, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		o.line(strings.TrimRight(string(line), "\r"))
		o.partial = rest
	}
}

func (o *output) line(line string) {
	if o.last = append(o.last, strings.ReplaceAll(line, string(rune(marker)), "")); len(o.last) > lastLines {
		o.last = o.last[1:]
	}
	// What a test printed without a line end stands before the marker.
	text, event, ok := strings.Cut(line, string(rune(marker)))
	if text != "" && o.current != nil {
		o.current.Log = append(o.current.Log, text)
	}
	if !ok {
		return
	}
	event = strings.TrimLeft(event, " ")
	kind, rest, _ := strings.Cut(event, " ")
	word, rest, _ := strings.Cut(strings.TrimLeft(rest, " "), " ")
	name, _, _ := strings.Cut(strings.TrimLeft(rest, " "), " ")
	switch kind {
	case "===":
		switch word {
		case "RUN", "CONT", "NAME":
			o.current = o.test(name)
		}
	case "---":
		result := strings.TrimSuffix(word, ":")
		switch result {
		case "PASS", "FAIL", "SKIP":
			t := o.test(name)
			t.Result = result
			o.current = t // what it logged may follow
		}
	}
}

func (o *output) test(name string) *test {
	if name == "" {
		return nil // "=== NAME" on its own: output of no test
	}
	t := o.byName[name]
	if t == nil {
		t = &test{Name: name}
		if o.byName == nil {
			o.byName = make(map[string]*test)
		}
		o.byName[name] = t
		o.Tests = append(o.Tests, t)
	}
	return t
}

// exit judges the program's end, of one that was run as root or not.
func (p *packageRun) exit(e *job.Exit, root bool) {
	p.Elapsed = e.Elapsed
	reason := fmt.Sprintf("exit status %d after %v", e.Code, e.Elapsed.Round(time.Millisecond))
	if e.TimedOut {
		reason += ", past its time limit"
	}
	p.finish(e.Code != 0 || e.TimedOut, reason)
	for _, t := range p.Tests {
		// These guests keep nothing from root.
		missing, _ := strings.CutPrefix(t.reason(), "missing: ")
		if root && t.Result == "SKIP" && (missing == "root" || strings.HasPrefix(missing, "permission")) {
			t.Result = "FAIL"
			t.Log = append(t.Log, "skipped for lack of what root has")
		}
	}
}

// finish judges the program's end. Tests that had not ended by then have failed; if
// there are none, and no other failure, a program that did not succeed has failed
// as a whole. A skip that names nothing that is missing is a failure.
func (o *output) finish(failed bool, reason string) {
	if len(o.partial) > 0 {
		o.line(string(o.partial))
		o.partial = nil
	}
	for _, t := range o.Tests {
		if t.Result == "" {
			t.Result = "FAIL"
			t.Log = append(t.Log, "not ended: "+reason)
		}
		if t.Result == "SKIP" && !strings.HasPrefix(t.reason(), "missing: ") {
			t.Result = "FAIL"
			t.Log = append(t.Log, "skipped without saying what is missing")
		}
	}
	failed = failed || len(o.Tests) == 0
	for _, t := range o.Tests {
		if t.Result == "FAIL" {
			failed = false
		}
	}
	if !failed {
		return
	}
	t := o.test("(program)")
	t.Result = "FAIL"
	t.Log = append(o.last, reason)
}

// position is the place in the source at the beginning of what a test logs.
var position = regexp.MustCompile(`^\s*\S+\.go:\d+: `)

// reason is why a test was skipped: the last it logged.
func (t *test) reason() string {
	for i := len(t.Log) - 1; i >= 0; i-- {
		line := t.Log[i]
		if position.MatchString(line) {
			return strings.TrimSpace(position.ReplaceAllString(line, ""))
		}
	}
	return "no reason given"
}
