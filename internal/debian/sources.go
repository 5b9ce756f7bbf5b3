package debian

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// source is an entry of an apt sources file.
type source struct {
	uris       []string
	suites     []string
	components []string
	signedBy   string
}

// machineArchives returns the addresses of the Debian archive that the apt
// sources under etc name.
func machineArchives(etc string) ([]string, error) {
	lists, err := filepath.Glob(filepath.Join(etc, "sources.list.d", "*.list"))
	if err != nil {
		return nil, err
	}
	stanzas, err := filepath.Glob(filepath.Join(etc, "sources.list.d", "*.sources"))
	if err != nil {
		return nil, err
	}
	var sources []source
	for _, name := range slices.Concat([]string{filepath.Join(etc, "sources.list")}, lists, stanzas) {
		text, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if strings.HasSuffix(name, ".sources") {
			sources = append(sources, parseStanzas(string(text))...)
		} else {
			sources = append(sources, parseLines(string(text))...)
		}
	}
	uris := archives(sources)
	if len(uris) == 0 {
		return nil, fmt.Errorf("no source in %s names the Debian archive (a release's main component, signed by Debian): add one", etc)
	}
	return uris, nil
}

// archives returns the addresses that may be the Debian archive's. The
// security archive, which has no other suites, and sources with a key of
// their own are not. Somebody else's source without one may be among them:
// its signature gives it away later.
func archives(sources []source) []string {
	var uris []string
	for _, s := range sources {
		security := slices.ContainsFunc(s.suites, func(suite string) bool {
			return strings.HasSuffix(suite, "-security") || strings.HasSuffix(suite, "/updates")
		})
		foreign := s.signedBy != "" && !strings.Contains(s.signedBy, "debian-archive")
		if security || foreign || !slices.Contains(s.components, "main") {
			continue
		}
		for _, uri := range s.uris {
			if !strings.HasPrefix(uri, "cdrom:") && !slices.Contains(uris, uri) {
				uris = append(uris, uri)
			}
		}
	}
	return uris
}

// parseLines reads the one-line format: deb [options] uri suite component...
func parseLines(text string) []source {
	var sources []source
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb")
		if !ok || rest == strings.TrimLeft(rest, " \t") {
			continue // not the word deb, but empty, deb-src or broken
		}
		rest = strings.TrimSpace(rest)
		var s source
		if strings.HasPrefix(rest, "[") {
			options, after, ok := strings.Cut(rest[1:], "]")
			if !ok {
				continue
			}
			for option := range strings.FieldsSeq(options) {
				if value, ok := strings.CutPrefix(option, "signed-by="); ok {
					s.signedBy = value
				}
			}
			rest = after
		}
		fields := strings.Fields(rest)
		if len(fields) < 2 {
			continue
		}
		s.uris, s.suites, s.components = fields[:1], fields[1:2], fields[2:]
		sources = append(sources, s)
	}
	return sources
}

// parseStanzas reads the deb822 format: stanzas of "Field: value" lines, where
// a line that begins with a blank continues the value.
func parseStanzas(text string) []source {
	var sources []source
	fields := make(map[string]string)
	add := func() {
		if slices.Contains(strings.Fields(fields["types"]), "deb") && !disabled(fields["enabled"]) {
			sources = append(sources, source{
				uris:       strings.Fields(fields["uris"]),
				suites:     strings.Fields(fields["suites"]),
				components: strings.Fields(fields["components"]),
				signedBy:   strings.TrimSpace(fields["signed-by"]),
			})
		}
		clear(fields)
	}
	last := ""
	for line := range strings.Lines(text) {
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			add()
		case strings.HasPrefix(line, " "), strings.HasPrefix(line, "\t"):
			fields[last] += line
		default:
			name, value, _ := strings.Cut(line, ":")
			last = strings.ToLower(strings.TrimSpace(name))
			fields[last] = value
		}
	}
	add()
	return sources
}

func disabled(enabled string) bool {
	switch strings.ToLower(strings.TrimSpace(enabled)) {
	case "no", "false", "without", "off", "disable":
		return true
	}
	return false
}
