/* A reader of JSON (RFC 8259) that refuses whatever else: enough for documents of the service. */
#include "fake.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#define DEEPEST 32

static Json *value(const char **at, int depth);

static void skip(const char **at) {
    while (**at && strchr(" \t\r\n", **at))
        ++*at;
}

static bool word(const char **at, const char *expected) {
    size_t length = strlen(expected);
    if (strncmp(*at, expected, length))
        return false;
    *at += length;
    return true;
}

static bool escape(const char **at, Text *text) {
    static const char names[] = "\"\\/bfnrt", means[] = "\"\\/\b\f\n\r\t";
    const char *found = **at ? strchr(names, **at) : NULL;
    if (found) {
        text_add(text, means + (found - names), 1);
        ++*at;
        return true;
    }
    if (**at != 'u')
        return false;
    char digits[5] = {0};
    for (int i = 0; i < 4; i++)
        if (!isxdigit((unsigned char)(digits[i] = (*at)[1 + i])))
            return false;
    *at += 5;
    unsigned long unit = strtoul(digits, NULL, 16);
    if (!unit || unit > 0x7F) /* what a control character needs; the rest comes as it is */
        return false;
    text_print(text, "%c", (char)unit);
    return true;
}

static char *quoted(const char **at) {
    Text text = {0};
    text_add(&text, "", 0);
    if (!word(at, "\""))
        goto wrong;
    while (**at != '"') {
        if ((unsigned char)**at < 0x20)
            goto wrong;
        if (**at == '\\') {
            ++*at;
            if (!escape(at, &text))
                goto wrong;
        } else {
            text_add(&text, *at, 1);
            ++*at;
        }
    }
    ++*at;
    return text.data;
wrong:
    text_clear(&text);
    return NULL;
}

/* The members of an object, or the items of an array, up to its end. */
static bool inside(const char **at, Json *parent, int depth) {
    char end = parent->kind == J_OBJECT ? '}' : ']';
    Json **last = &parent->first;
    skip(at);
    if (**at == end)
        return ++*at, true;
    for (;;) {
        char *name = NULL;
        skip(at);
        if (parent->kind == J_OBJECT) {
            if (!(name = quoted(at)))
                return false;
            skip(at);
            if (json_member(parent, name) || !word(at, ":")) {
                free(name);
                return false;
            }
        }
        Json *child = value(at, depth + 1);
        if (!child) {
            free(name);
            return false;
        }
        child->name = name;
        *last = child;
        last = &child->next;
        skip(at);
        if (**at == end)
            return ++*at, true;
        if (!word(at, ","))
            return false;
    }
}

static Json *value(const char **at, int depth) {
    Json *json = calloc(1, sizeof *json);
    bool good = depth < DEEPEST;
    skip(at);
    if (**at == '{' || **at == '[') {
        json->kind = **at == '{' ? J_OBJECT : J_ARRAY;
        ++*at;
        good = good && inside(at, json, depth);
    } else if (**at == '"') {
        json->kind = J_STRING;
        good = (json->string = quoted(at)) != NULL;
    } else if (word(at, "true") || word(at, "false")) {
        json->kind = J_BOOL;
        json->boolean = (*at)[-2] == 'u';
    } else if (!word(at, "null")) {
        char *end;
        json->kind = J_NUMBER;
        json->number = strtod(*at, &end);
        good = end != *at && (isdigit((unsigned char)**at) || **at == '-');
        *at = end;
    }
    if (good)
        return json;
    json_free(json);
    return NULL;
}

/* NULL for what is no document. */
Json *json_parse(const char *text) {
    Json *json = value(&text, 0);
    skip(&text);
    if (json && *text) {
        json_free(json);
        return NULL;
    }
    return json;
}

void json_free(Json *json) {
    while (json) {
        Json *next = json->next;
        json_free(json->first);
        free(json->string);
        free(json->name);
        free(json);
        json = next;
    }
}

const Json *json_member(const Json *object, const char *name) {
    if (!object || object->kind != J_OBJECT)
        return NULL;
    for (const Json *child = object->first; child; child = child->next)
        if (!strcmp(child->name, name))
            return child;
    return NULL;
}

/* NULL if it is none. */
const char *json_string(const Json *object, const char *name) {
    const Json *found = json_member(object, name);
    return found && found->kind == J_STRING ? found->string : NULL;
}
