package vm

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-uffd/uffd/internal/vm/job"
)

func TestWatch(t *testing.T) {
	const nonce = "n1"
	event := func(e job.Event) string {
		b, err := job.Encode(nonce, e)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	boot := event(job.Event{Boot: &job.Boot{Release: "7.3"}})
	start := event(job.Event{Start: &job.Start{}})
	exit := event(job.Event{Exit: &job.Exit{Code: 3}})
	done := event(job.Event{Done: true})
	const panics = "[1.0] Kernel panic - not syncing: Attempted to kill init!\n"
	broken := errors.New("broken")
	for _, test := range []struct {
		name    string
		console string
		output  string
		events  int
		handle  error
		want    error  // nil: see says
		says    string // "": no error
	}{
		{name: "all is well", console: "firmware\n" + boot + start + "out\nput" + exit + done, output: "out\nput", events: 3},
		{name: "no boot", console: "firmware\nno kernel\n", output: "firmware\nno kernel\n", want: ErrNoMarker},
		{name: "no marker", console: boot + start + "out\n" + exit + "more", output: "out\nmore", events: 3, want: ErrNoMarker},
		{name: "panic", console: boot + "out\n" + panics + "trace\n", output: "out\n" + panics + "trace\n", events: 1, want: ErrPanic},
		{name: "panic before boot", console: panics, output: panics, want: ErrPanic},
		{name: "panic without a line end", console: boot + strings.TrimSpace(panics), output: strings.TrimSpace(panics), events: 1, want: ErrPanic},
		{name: "panic quoted by a program with an end", console: boot + start + "says: " + panics + exit + done, events: 3, output: "says: " + panics},
		{name: "guest's error", console: event(job.Event{Error: "mount /proc: no"}), says: "mount /proc: no"},
		{name: "host's error", console: boot + done, events: 1, handle: broken, want: broken},
		{name: "another's event", console: boot + start + "<vm n2 e30=>\n" + exit + done, output: "<vm n2 e30=>\n", events: 3},
		{name: "broken event", console: boot + "<vm n1 e30\n", events: 1, says: "cut short"},
		{name: "no boot event", console: start + exit + done, says: "lost", output: ""},
		{name: "no program", console: boot + done, events: 1, says: "lost"},
		{name: "no start event", console: boot + exit + done, events: 1, says: "lost"},
		{name: "no exit event", console: boot + start + "<v[ 1.0] emergency\n" + done, output: "<v[ 1.0] emergency\n", events: 2, says: "lost"},
		{name: "event of another program", console: boot + event(job.Event{Start: &job.Start{Program: 1}}) + exit + done, events: 1, says: "lost"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var output bytes.Buffer
			events := 0
			g := guest{
				config: &Config{Output: &output, Job: job.Job{Nonce: nonce, Programs: make([]job.Program, 1)}},
				stop:   func(error) {},
				handle: func(job.Event) error { events++; return test.handle },
			}
			g.limit(time.Hour, "")
			defer func() { g.timer.Stop() }()
			err := g.watch(strings.NewReader(test.console))
			if test.want != nil || test.says == "" {
				if err != test.want {
					t.Errorf("error %v, want %v", err, test.want)
				}
			} else if err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("error %v, want one that says %q", err, test.says)
			}
			if output.String() != test.output {
				t.Errorf("output %q, want %q", &output, test.output)
			}
			if events != test.events {
				t.Errorf("%d events, want %d", events, test.events)
			}
		})
	}
}

// Output has to come as it is written, not when the guest ends.
func TestWatchStreams(t *testing.T) {
	console, guestSide := io.Pipe()
	host, output := io.Pipe()
	g := guest{
		config: &Config{Output: output, Job: job.Job{Nonce: "n"}},
		stop:   func(error) {},
		handle: func(job.Event) error { return nil },
	}
	g.limit(time.Hour, "")
	defer func() { g.timer.Stop() }()
	result := make(chan error, 1)
	go func() { result <- g.watch(console) }()
	boot, err := job.Encode("n", job.Event{Boot: &job.Boot{}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := guestSide.Write(append(boot, "line\n"...)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(host, got); err != nil || string(got) != "line\n" {
		t.Fatalf("read %q, %v", got, err)
	}
	guestSide.Close()
	if err := <-result; err != ErrNoMarker {
		t.Errorf("error %v", err)
	}
}

func TestSourceTree(t *testing.T) {
	root := t.TempDir()
	for name, size := range map[string]int{
		"go.mod":                   10,
		"a.go":                     1,
		"large.bin":                1 << 20,
		"pkg/testdata/large.bin":   1 << 20,
		"pkg/testdata/sub/x":       0,
		".git/config":              5,
		"pkg/.hidden/x":            5,
		"pkg/.keep":                0,
		"nested/testdata.go/big.c": 1 << 20,
	} {
		path := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	files, err := SourceTree(root, "/src")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, f.Guest)
	}
	slices.Sort(got)
	want := []string{"/src/a.go", "/src/go.mod", "/src/pkg/.keep", "/src/pkg/testdata/large.bin", "/src/pkg/testdata/sub/x"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestGuestEnv(t *testing.T) {
	got := GuestEnv([]string{"UFFD_TEST_MASK=0x1ff", "UFFD_VM_CACHE=/x", "HOME=/home/me", "GODEBUG=a=1", "GOMAXPROCS=1", "GOFLAGS=-v", "SECRET=1"})
	for _, want := range []string{"UFFD_TEST_MASK=0x1ff", "GODEBUG=a=1", "GOMAXPROCS=1", "HOME=/tmp"} {
		if !slices.Contains(got, want) {
			t.Errorf("%q lacks %s", got, want)
		}
	}
	for _, entry := range got {
		for _, not := range []string{"UFFD_VM_CACHE", "/home/me", "GOFLAGS", "SECRET"} {
			if strings.Contains(entry, not) {
				t.Errorf("%q passes into the guest", entry)
			}
		}
	}
}
