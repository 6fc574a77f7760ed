// What the native tests check with.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition);  \
      std::exit(1);                                                             \
    }                                                                           \
  } while (false)

#define CHECK_THROWS(Error, statement)                                          \
  do {                                                                          \
    bool thrown = false;                                                        \
    try {                                                                       \
      statement;                                                                \
    } catch (const Error&) {                                                    \
      thrown = true;                                                            \
    }                                                                           \
    if (!thrown) {                                                              \
      std::fprintf(stderr, "%s:%d: no %s\n", __FILE__, __LINE__, #Error);       \
      std::exit(1);                                                             \
    }                                                                           \
  } while (false)
