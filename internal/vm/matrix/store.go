package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// A store has the results of guests where nothing failed, in a file, so that a matrix
// that was stopped, or where a guest failed, can be gone on with.
type store struct {
	file string // "" keeps nothing
	runs map[string]*run
}

func openStore(file string) (*store, error) {
	s := &store{file, make(map[string]*run)}
	if file == "" {
		return s, nil
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &s.runs)
	}
	if err != nil {
		return nil, fmt.Errorf("results of an earlier run: %w", err)
	}
	return s, nil
}

// restore gives r the results that were kept as key, and reports whether there
// are any.
func (s *store) restore(r *run, key string) bool {
	old := s.runs[key]
	if old == nil {
		return false
	}
	r.Release, r.PageSize, r.Features, r.Packages = old.Release, old.PageSize, old.Features, old.Packages
	return true
}

// keep keeps the results of r, unless something failed.
func (s *store) keep(r *run, key string) error {
	if s.file == "" || r.count("FAIL") > 0 {
		return nil
	}
	s.runs[key] = r
	text, err := json.Marshal(s.runs)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.file+".new", text, 0o644); err != nil {
		return err
	}
	return os.Rename(s.file+".new", s.file)
}
